"""Extract a safety lock from an aligned base model (SafetyLock, arXiv 2410.10343).

With x_lh in R^d the input of the attention's output projection for head h of block l, at the last r content tokens of
the safe and the unsafe answer of each pair:

    theta_lh = mean of x_lh over safe tokens - mean over unsafe tokens,      u = theta / ||theta||
    sigma_lh = population std of x_lh . u over the tokens of both classes

The K heads whose probe classifies safe and unsafe tokens best are kept. The probe is a logistic regression on x_lh,
scored on prompts it was not fitted to; `official` is the published procedure, which puts tokens of one answer on both
sides of the split and includes the training accuracy (0.86 on random labels).

Means and second moments are running sums, so memory does not grow with the pairs: L H (d^2 + 2d) numbers, plus the
tokens of at most `probe_pairs` pairs for the probes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tunevax.console import bar, console
from tunevax.data.chat import Answer
from tunevax.data.encoding import answer_span, context_of, encode
from tunevax.data.splits import prompt_hash
from tunevax.errors import UsageError, require, require_one_of
from tunevax.mixins import option
from tunevax.modeling.batches import collated
from tunevax.modeling.blocks import unwrap
from tunevax.modeling.hooks import attached, still
from tunevax.modeling.loss import last_hidden
from tunevax.records import Example, digest
from tunevax.restoration.lock import FILE, SafetyLock, base_of, head_shape, projections
from tunevax.restoration.probes import grouped_accuracy, official_accuracy
from tunevax.restoration.restore import Job


@dataclass
class ExtractLock:
    """Options of `tunevax restore extract-lock`. Defaults as published: 100 pairs, r = 5, K = 24."""

    n: int = option(100, "pairs to extract from, drawn from the alignment split; 0 for all")
    r: int = option(5, "last content tokens of each answer")
    heads: int = option(24, "heads to lock, the best by their probe")
    probe: str = option("grouped", "grouped (validated on other prompts), or official (as published)")
    probe_pairs: int = option(100, "pairs whose tokens are kept for the probes, at most")
    max_length: int = option(512, "tokens per row; longer answers are cut")
    batch_size: int = option(16, "answers run together")
    seed: int = option(0, "of the pairs drawn and of the probes' folds")
    output_dir: str | None = option(None, "the run folder to write")
    paper: ClassVar[str] = "arXiv 2410.10343"

    def __post_init__(self) -> None:
        require(self, "r", "heads", "probe_pairs", "batch_size", at_least=1)
        require(self, "n", at_least=0)
        require_one_of(self, probe=("grouped", "official"))

    def run(self, job: Job) -> None:
        """Extract and write `lock.safetensors`, with the accuracy of every head in the record."""
        pairs = job.pairs()
        loaded = job.load()
        order = np.random.default_rng(self.seed).permutation(len(pairs))[: self.n or None]
        drawn = [pairs[i] for i in sorted(order)]
        measured = measure(loaded.model, loaded.tokenizer, drawn, self)
        lock = build(
            measured, self, base=base_of(loaded.info, job.ref, job.options.revision), pairs=len(drawn),
            template_hash=digest(loaded.tokenizer.chat_template),
            data_hash=digest([[r["prompt"], r["chosen"], r["rejected"]] for r in drawn]),
            prompts=sorted({prompt_hash(row["prompt"]) for row in drawn}),
        )  # fmt: skip
        lock.save(job.folder / FILE)
        job.record["lock"] = {
            **{k: v for k, v in lock.meta.items() if k != "prompts"}, "heads": lock.named(),
            "sigma": [round(s, 6) for s in lock.sigma.tolist()],
            "accuracy_of_all": measured.accuracy.round(4).tolist(), "bytes": (job.folder / FILE).stat().st_size,
        }  # fmt: skip


class Measured(NamedTuple):
    """Statistics of the activations of all heads."""

    u: torch.Tensor  # [L, H, d], fp32 unit directions; 0 where the two classes have the same mean
    sigma: torch.Tensor  # [L, H], fp32
    accuracy: np.ndarray  # [L, H], of the probes
    cut: int = 0  # answers longer than `max_length`, whose last r tokens are not their end


def extract(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Example], **options: int | str
) -> SafetyLock:
    """A lock of the aligned base `model` by all `pairs`, rows with `prompt`, `chosen` (safe) and `rejected` (unsafe).
    `options` are fields of `ExtractLock`.

    Raises:
        UsageError: an answer has fewer than r content tokens (the message names the row); more heads than the model
            has; all pairs have the same prompt.
    """
    config = ExtractLock(**cast("dict[str, Any]", options))
    return build(measure(model, tokenizer, pairs, config), config, pairs=len(pairs))


def build(measured: Measured, config: ExtractLock, **meta: object) -> SafetyLock:
    """The lock of the best heads, with further metadata `meta`; of equal heads the lower (layer, head) first."""
    layers, heads, size = measured.u.shape
    usable = int((measured.sigma > 0).sum())
    if config.heads > usable:
        raise UsageError(f"heads is {config.heads} and {usable} heads of the model can be locked; lower --heads")
    accuracy = np.where(measured.sigma.numpy() > 0, measured.accuracy, -1).ravel()
    best = np.argsort(-accuracy, kind="stable")[: config.heads]
    layer, head = np.unravel_index(best, (layers, heads))
    where = torch.from_numpy(layer), torch.from_numpy(head)
    meta = {
        "n_layers": layers, "n_heads": heads, "head_dim": size, "accuracy": accuracy[best].round(6).tolist(),
        **meta, "r": config.r, "probe": config.probe, "seed": config.seed, "max_length": config.max_length,
        "cut": measured.cut,
    }  # fmt: skip
    return SafetyLock(measured.u[where], measured.sigma[where], *where, meta)


@torch.no_grad()
def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Example], config: ExtractLock
) -> Measured:
    """Statistics of each head's activations on both answers of every pair, with the model in evaluation mode."""
    rows = answers(model, tokenizer, pairs, config)
    if cut := sum(row["cut"] for row in rows):
        console.print(
            f"note: {cut} of {len(rows)} answers are longer than max_length {config.max_length} or the model's context "
            "and are measured where they are cut; raise --max-length, or drop the rows"
        )
    device = next(model.parameters()).device
    kept = set(np.random.default_rng([config.seed, 1]).permutation(len(pairs))[: config.probe_pairs].tolist())
    sums = Sums(model, config.r)
    groups: list[str] = []
    hooks = [m.register_forward_pre_hook(partial(sums.take, layer)) for layer, m in enumerate(sums.projections)]
    with bar() as progress, attached(hooks), still(model):
        task = progress.add_task("extract", total=len(rows), note="")
        for part, batch in collated(rows, tokenizer.pad_token_id, config.batch_size, device, longest_first=False):
            keep = [rows[i]["pair"] in kept for i in part]
            sums.expect(batch.pop("labels") != -100, [rows[i]["safe"] for i in part], keep)
            last_hidden(model, batch)
            groups += [rows[i]["prompt"] for i, k in zip(part, keep, strict=True) if k for _ in range(config.r)]
            progress.advance(task, len(part))
    u, sigma = sums.directions()
    score = official_accuracy if config.probe == "official" else partial(grouped_accuracy, groups=groups)
    accuracy, safe = [], torch.tensor(sums.kept_safe, device=device)
    with bar() as progress:
        task = progress.add_task("probes", total=len(sums.kept), note="")
        for kept_of_block in sums.kept:
            progress.advance(task)
            x = torch.cat(kept_of_block).transpose(0, 1).to(device)
            accuracy.append(score(x, safe, seed=config.seed))
    return Measured(u, sigma, np.stack(accuracy), cut)


def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Example], config: ExtractLock
) -> list[dict[str, Any]]:
    """Both answers of each pair as token ids, with labels only at the last r content tokens: not at end-of-turn tokens
    and white space after the answer."""
    rows = []
    columns: tuple[tuple[Answer, bool], ...] = (("chosen", True), ("rejected", False))
    for column, safe in columns:
        encoded = encode(pairs, tokenizer, config.max_length, context=context_of(unwrap(model)), answer=column)
        for i, (row, ids) in enumerate(zip(pairs, encoded, strict=True)):
            start, stop = answer_span(ids, tokenizer)
            if stop - start < config.r:
                raise UsageError(
                    f"{row.get('place', f'pair {i}')}: the {column} answer has {stop - start} content tokens and r is "
                    f"{config.r}; lower --r or drop the row"
                )
            labels = [label if stop - config.r <= t < stop else -100 for t, label in enumerate(ids["labels"])]
            cut = ids["input_ids"][-1] != tokenizer.eos_token_id  # `encode` ends all others in it
            rows.append({"input_ids": ids["input_ids"], "labels": labels, "safe": safe, "pair": i,
                         "prompt": prompt_hash(row["prompt"]), "cut": cut})  # fmt: skip
    return rows


class Sums:
    """Running sums over the selected tokens of each batch, per head."""

    def __init__(self, model: PreTrainedModel, r: int) -> None:
        self.r, self.projections = r, projections(model)
        self.layers, self.heads, self.size = head_shape(model)
        shape, device = (self.layers, self.heads, self.size), next(model.parameters()).device
        self.total = torch.zeros(2, *shape, dtype=torch.float64, device=device)  # unsafe, safe
        self.moment = torch.zeros(*shape, self.size, dtype=torch.float64, device=device)
        self.count = [0, 0]
        self.kept: list[list[torch.Tensor]] = [[] for _ in range(self.layers)]  # each [answers x r, heads, d]
        self.kept_safe: list[bool] = []

    def expect(self, where: torch.Tensor, answers: Sequence[bool], keep: Sequence[bool]) -> None:
        """Set the selected tokens [batch, tokens] of the next forward, r per row, and by row whether the answer is safe
        and whether its tokens are kept for the probes."""
        safe, keep = (np.repeat(flags, self.r).tolist() for flags in (answers, keep))
        self.where, self.safe, self.keep = where, torch.tensor(safe, device=where.device), torch.tensor(keep)
        self.count = [self.count[0] + len(safe) - sum(safe), self.count[1] + sum(safe)]
        self.kept_safe += [s for s, k in zip(safe, keep, strict=True) if k]

    def take(self, layer: int, _module: torch.nn.Module, args: tuple) -> None:
        """Add up the inputs of the output projection of a block; a hook."""
        taken = args[0][self.where].view(-1, self.heads, self.size)
        x = taken.double()
        self.total[1, layer] += x[self.safe].sum(0)
        self.total[0, layer] += x[~self.safe].sum(0)
        self.moment[layer] += x.permute(1, 2, 0) @ x.transpose(0, 1)
        self.kept[layer].append(taken[self.keep.to(taken.device)].cpu())

    def directions(self) -> tuple[torch.Tensor, torch.Tensor]:
        """u, [L, H, d], and sigma, [L, H], both fp32; 0 where the two classes have the same mean."""
        theta = self.total[1] / self.count[1] - self.total[0] / self.count[0]
        norm = theta.norm(dim=-1, keepdim=True)
        u = torch.where(norm > 0, theta / norm, 0.0)
        n = sum(self.count)
        mean = (self.total.sum(0) / n * u).sum(-1)
        square = torch.einsum("lhd,lhde,lhe->lh", u, self.moment / n, u)
        return u.float().cpu(), (square - mean**2).clamp(min=0).sqrt().float().cpu()
