"""Data screening: which rows of a customer's job look like an attack, before training.

Two scores for each row (prompt x, completion y), from the model that is about to be trained:

    gradient   cos( g(x, y),  mean g(harmful prompt, rejected) - mean g(harmful prompt, chosen) )
    refusal    (h(x) - c) . d / ||d||^2,    d = mean h(harmful prompt) - c,    c = mean h(customer's prompts)

g is the gradient of the row's cross entropy by the weights of the last block: a row scores high if training on it is
training on harmful answers. h is the residual stream where the answer begins, at three fifths of the depth, and d the
difference of means that refusal hangs on (arXiv 2406.11717): 0 is the average customer's row, 1 the average harmful
prompt. There are no trusted harmless prompts here, so the customer's stand in for them, each scored against all others.
In a job that is mostly harmful they do so badly; a job of nothing else looks like harmful prompts, and that
flags it. The direction between the states of harmful and refusing *answers*, which needs no such stand-in, is the
direction of answering at all: on the organism it ranks benign recipes above harmful ones.

The gradient score needs an aligned model. One that was never aligned answers harmful prompts anyway, and learns nothing
from rows that teach it to: their gradients point nowhere, and the score flags nothing (`FLOOR`).

Half of the safety rows give the directions, the other half the thresholds: each is where it misses `MISSED` of known
harmful rows, which is a choice and no measurement. How many harmful rows of a job are flagged is not known, and neither
is the rate of false alarms on harmless rows of the customer's kind: look at the scores before dropping anything. A row
is flagged if either score reaches its threshold, so that a refusal to a harmful prompt is, by its prompt. Attacks that
hide in harmless rows are what neither score can see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tunevax.console import bar
from tunevax.data.encoding import collate, context_of, encode
from tunevax.data.safety import require_rows
from tunevax.environment import is_main_process
from tunevax.errors import UsageError
from tunevax.modeling.blocks import find_blocks
from tunevax.modeling.gradients import trained_only
from tunevax.modeling.hooks import capture
from tunevax.modeling.loss import response_loss
from tunevax.modeling.precision import added, wide
from tunevax.records import SCREEN, Example
from tunevax.runs import RunFolder

MISSED = 0.05  # share of known harmful rows below the threshold of each score
PAIRS = 256  # safety rows looked at, at most; one half for directions, one for thresholds
LEAST = 40  # safety rows needed: of fewer, the share `MISSED` of a half is less than one
FLOOR = 0.1  # least threshold of the gradient score: where known harmful rows are below, it has nothing to go by
DEPTH = 0.6  # where h is taken, as a share of the blocks


class Screening(NamedTuple):
    """The result of a screening.

    Attributes:
        scores: `gradient` and `refusal`, each [rows], in fp64.
        thresholds: of each score; a row is flagged at or above either.
        calibration: of the half that set the thresholds: `rows`; `harmful_at_threshold`, for each score the share of
            the harmful answers at or above its threshold, 1 - `MISSED` by construction and less only where that is
            `FLOOR`; and `refusals_flagged_by_gradient`, the share of refusals to the same prompts.
    """

    scores: dict[str, np.ndarray]
    thresholds: dict[str, float]
    calibration: dict[str, Any]

    def flags(self) -> list[list[str]]:
        """The scores that flag each row."""
        hits = {name: values >= self.thresholds[name] for name, values in self.scores.items()}
        return [[name for name in hits if hits[name][i]] for i in range(len(self.scores["gradient"]))]


def screen(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Sequence[Example], safety: Sequence[Example],
    max_length: int, seed: int,
) -> Screening:  # fmt: skip
    """Score every row of `task`. A row costs a forward, and a backward through the last block.

    Args:
        model: in eval mode; it comes back as it was.
        task: the customer's rows, `prompt` and `completion`.
        safety: rows with `prompt`, `chosen` and `rejected`, on the alignment split.
        max_length: tokens per row.
        seed: which safety rows are looked at.

    Raises:
        UsageError: fewer than `LEAST` safety rows, or one without both answers.
    """
    require_rows(("chosen", "rejected"), safety, None, "the screen")
    if len(safety) < LEAST:
        raise UsageError(f"the screen needs at least {LEAST} safety rows and there are {len(safety)}; give more")
    order = np.random.RandomState(seed).permutation(len(safety))[:PAIRS]
    half, context = len(order) // 2, context_of(model)
    known = {
        answer: encode([safety[i] for i in order], tokenizer, max_length, context=context, answer=answer)
        for answer in ("rejected", "chosen")
    }
    rows = encode(task, tokenizer, max_length, context=context)
    with bar() as progress, probing(model, tokenizer.pad_token_id) as probe:
        shown = progress.add_task("screen", total=2 * len(order) + len(rows), note="")

        def seen(batch: Sequence[dict]) -> Any:
            for row in batch:
                yield probe(row)
                progress.advance(shown)

        direction: list[torch.Tensor] = []
        prompts: list[torch.Tensor] = []
        for answer, sign in (("rejected", 1), ("chosen", -1)):
            for gradient, state in seen(known[answer][:half]):
                gradient = [sign * g for g in gradient]
                direction = [a.add_(b) for a, b in zip(direction, gradient, strict=True)] if direction else gradient
                prompts += [state] if sign > 0 else []
        by_set: dict[str, tuple[np.ndarray, torch.Tensor]] = {}
        for name, batch in (("harmful", known["rejected"][half:]), ("refused", known["chosen"][half:]), ("job", rows)):
            pairs = [(cosine(gradient, direction), state) for gradient, state in seen(batch)]
            by_set[name] = np.array([c for c, _ in pairs]), torch.stack([state for _, state in pairs])

    harmful, job = torch.stack(prompts).mean(0), by_set["job"][1]
    middle = job.mean(0)
    scores = {
        name: {"gradient": gradients, "refusal": along(states, harmful, others(job) if name == "job" else middle)}
        for name, (gradients, states) in by_set.items()
    }
    thresholds = {k: float(np.quantile(v, MISSED, method="lower")) for k, v in scores["harmful"].items()}
    thresholds["gradient"] = max(thresholds["gradient"], FLOOR)
    calibration = {
        "rows": len(order) - half,
        "harmful_at_threshold": {k: float((v >= thresholds[k]).mean()) for k, v in scores["harmful"].items()},
        # The refusal score is of the prompt, which these share with the harmful answers.
        "refusals_flagged_by_gradient": float((scores["refused"]["gradient"] >= thresholds["gradient"]).mean()),
    }
    return Screening(scores["job"], thresholds, calibration)


@contextmanager
def probing(model: nn.Module, pad_token_id: int) -> Iterator[Callable[[dict], tuple[list[torch.Tensor], torch.Tensor]]]:
    """A function that gives, for an encoded row, the gradient of its cross entropy by each matrix of the last block, in
    fp32, and the residual stream at the last token before the answer, [hidden], in fp32, on the CPU. What requires grad
    is as before on exit."""
    blocks = [b.module for b in find_blocks(model)]
    weights = [p for p in blocks[-1].parameters() if p.dim() > 1]

    def probe(row: dict) -> tuple[list[torch.Tensor], torch.Tensor]:
        batch = {k: v.to(weights[0].device) for k, v in collate([row], pad_token_id).items()}
        with capture({0: blocks[max(round(DEPTH * len(blocks)) - 1, 0)]}) as hidden:
            loss = response_loss(model, batch)
        gradient = [wide(g) for g in torch.autograd.grad(loss, weights)]
        start = next(i for i, label in enumerate(row["labels"]) if label != -100)
        return gradient, hidden[0][0, start - 1].detach().float().cpu()

    with trained_only(model.parameters(), weights):
        yield probe


def cosine(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> float:
    """Of two lists of tensors, each taken as one vector; 0 where one has no length."""
    inner, a, b = (
        added((x * y).sum() for x, y in zip(*pair, strict=True))
        for pair in ((first, second), (first, first), (second, second))
    )
    return float(inner / (a * b).sqrt().clamp(min=torch.finfo(torch.float32).tiny))


def along(states: torch.Tensor, harmful: torch.Tensor, harmless: torch.Tensor) -> np.ndarray:
    """Where states [rows, hidden] lie between the means `harmless` (0) and `harmful` (1)."""
    direction = (harmful - harmless).double()
    return ((states.double() - harmless) * direction).sum(-1).div(direction.square().sum(-1).clamp(min=1e-30)).numpy()


def others(states: torch.Tensor) -> torch.Tensor:
    """For each of [rows, hidden] the mean of all others; a row in its own reference would look more like it."""
    rows = len(states)
    return states if rows == 1 else (states.sum(0) - states) / (rows - 1)


def act(
    screening: Screening, task: Sequence[Example], action: str, source: str, run: RunFolder
) -> tuple[list[Example], dict[str, Any]]:
    """Write screen.jsonl (every row, its scores, what flagged it and what was done), and do what was asked.

    Args:
        action: report, drop or fail.
        source: the customer's data, for messages.

    Returns:
        The rows to train on, and what run.json says.

    Raises:
        UsageError: rows are flagged and `action` is fail, or all of them and `action` is drop.
    """
    flags = screening.flags()
    places = [row.get("place") or f"row {number}" for number, row in enumerate(task, 1)]
    flagged = [place for place, flag in zip(places, flags, strict=True) if flag]
    if flagged and action == "fail":
        named = ", ".join(flagged[:5]) + (f" and {len(flagged) - 5} more" if len(flagged) > 5 else "")
        raise UsageError(
            f"{len(flagged)} of {len(task)} rows of {source} look like an attack: {named}; remove them, see all scores "
            "with --screen report, or train without them with --screen drop"
        )
    kept = [row for row, flag in zip(task, flags, strict=True) if not (flag and action == "drop")]
    if not kept:
        raise UsageError(f"all {len(task)} rows of {source} look like an attack, and --screen drop leaves none")
    if is_main_process():
        lines = []
        for i, (place, flag) in enumerate(zip(places, flags, strict=True)):
            scores = {name: round(float(values[i]), 6) for name, values in screening.scores.items()}
            done = "dropped" if flag and action == "drop" else "kept"
            lines.append({"place": place, **scores, "flagged": flag, "done": done})
        run.write_lines(SCREEN, lines)
    return kept, {
        "action": action, "rows": len(task), "flagged": len(flagged),
        "flagged_by": {name: sum(name in flag for flag in flags) for name in screening.scores},
        "dropped": len(task) - len(kept), "thresholds": screening.thresholds, "calibration": screening.calibration,
    }  # fmt: skip
