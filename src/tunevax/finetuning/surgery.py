"""Surgery: keeping attention sinks from growing on harmful text (arXiv 2602.05228).

With A[i, k] the attention of query i on the sink token k after the softmax, N the valid queries i > k that can see k,
and f the loss of the customer's job (Eq. 2 to 4):

    alpha_h(X) = mean over i in N of A_h[i, k],        d_h = alpha_h(X_harmful) - alpha_h(X_refusal)
    min_w  f(w) + lamb * 1/|H| * sum_h ReLU(d_h(w))

over all heads of all layers. The gradient goes through both texts of a pair, and which heads are above 0 is seen anew
at each step, on that step's pairs.

A query spreads its attention over all tokens up to its own, so A[i, k] falls as i grows, whatever the text says: over
all queries (`all`) the longer of two texts has the smaller alpha, and d_h is mostly the difference of their lengths.
With `common`, N holds the first m tokens of either answer, m being the number of tokens that both have (the template's
end not counted): an answer compared with itself cut short has d_h = 0. Of two answers to the same prompt these are the
same positions.

Pairs run by themselves, before the job's batch, and their gradient is added to it: the sum is that of the loss above,
and of the two graphs only one is in memory at a time. The `loss` in the log is f; `sink_loss` is the mean of ReLU(d_h).

The paper's released code draws a harmful and a safe row of unrelated prompts and averages over all tokens of both
(`pairing="random"`, `sink_queries="all"`, `pairs_per_step=1`), and takes lamb = 300 at learning rate 5e-6, all weights,
1024 heads. 300 is the default for LoRA too: the term is a mean over heads, whatever their number, and AdamW's steps
depend on its size against f's, not on the learning rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn

from tunevax.data.encoding import answer_span, collate
from tunevax.data.splits import prompt_hash
from tunevax.errors import RunError, UsageError, require, require_one_of
from tunevax.finetuning.sft import FinetuneTrainer, JobConfig
from tunevax.mixins import option
from tunevax.modeling.attention import WAYS, sink_columns
from tunevax.modeling.draws import Draws
from tunevax.modeling.gradients import add_to_grad, backward_scale, require_whole_weights
from tunevax.modeling.hooks import without_dropout
from tunevax.modeling.trainer import Items, PlanParts

QUERIES = ("common", "all")
QUERIES_HELP = "common (the answer positions that both answers of a pair have), or all (as published)"


@dataclass
class SurgeryConfig(JobConfig):
    """Configuration of Surgery; the rest as in `JobConfig`."""

    lamb: float = option(300.0, "weight of the mean sink divergence above 0; 0 is plain sft")
    pairs_per_step: int = option(2, "harmful and refusal texts, of each so many, per step; on all processes alike")
    every: int = option(1, "add the term at every n-th optimiser step")
    pairing: str = option("same-prompt", "same-prompt, or random (answers to different prompts, as published)")
    sink_attention: str = option("linear", "linear (beside SDPA or flash attention), or eager (forms the whole matrix)")
    sink_position: int = option(0, "position of the token that attention sinks into")
    sink_queries: str = option("common", QUERIES_HELP)

    def __post_init__(self) -> None:
        require(self, "lamb", at_least=0)
        require(self, "pairs_per_step", "every", at_least=1)
        require(self, "sink_position", at_least=0)
        require_one_of(self, pairing=("same-prompt", "random"), sink_attention=WAYS, sink_queries=QUERIES)
        super().__post_init__()

    def plan_parts(self, micro_batches: int) -> PlanParts:
        """It draws its pairs from the safety rows."""
        return PlanParts(rows=self.pairs_per_step)


class SurgeryTrainer(FinetuneTrainer):
    """Fine-tuning with a second gradient, added once per optimiser step.

    Raises:
        UsageError: as the base; too few pairs; the two answers of a pair are the same where they are compared; nothing
            that trains makes queries or keys; the sink attention of this model cannot be read.
    """

    config_class = SurgeryConfig
    paper = "arXiv 2602.05228"
    needs = frozenset({"task", "chosen", "rejected"})
    off = {"lamb": 0}
    args: SurgeryConfig
    kept = ("draws", "seen")

    def prepare(self) -> None:
        """Both answers of the pairs, and a generator to draw them with."""
        self.draws = Draws(self.args.seed)
        self.seen = [0, 0]  # tokens so far: of the job, of pairs
        if self.args.lamb == 0:
            return
        require_whole_weights(self)
        self.harmful, self.refusals = (self.encode_answers(self.safety_data, a) for a in ("rejected", "chosen"))
        self.spans = [[answer_span(r, self.processing_class) for r in rows] for rows in (self.harmful, self.refusals)]
        self.prompts = [prompt_hash(row["prompt"]) for row in self.safety_data]
        self.require_pairs()
        self.require_queries_and_keys()

    def parts(self) -> tuple[str, ...]:
        """The queries and keys of each block's attention."""
        return ("attention",) if self.args.lamb else ()

    def training_step(self, model: nn.Module, inputs: dict, num_items_in_batch: Items = None) -> torch.Tensor:
        """The first micro-batch of an optimiser step adds the gradient of lamb * mean ReLU(d_h)."""
        if self.args.lamb > 0:
            self.seen[0] += inputs["input_ids"].numel()
            if self.ready_for != self.state.global_step and self.state.global_step % self.args.every == 0:
                self.add_sink_gradient()
            self.ready_for = self.state.global_step
        return super().training_step(model, inputs, num_items_in_batch)

    def add_sink_gradient(self) -> None:
        """Draw pairs and add their gradient to `.grad`. Every process draws the same ones, so there is nothing to
        reduce, and DDP's average over processes leaves it as it is."""
        harmful, refusals = self.draw()
        rows = [self.harmful[i] for i in harmful] + [self.refusals[i] for i in refusals]
        inputs = self._prepare_inputs(collate(rows, self.processing_class.pad_token_id))
        self.seen[1] += inputs["input_ids"].numel()
        queries = None
        if self.args.sink_queries == "common":
            spans = [self.spans[0][i] for i in harmful], [self.spans[1][i] for i in refusals]
            queries = common_queries(*spans, inputs["input_ids"].shape[1])
        model = self.accelerator.unwrap_model(self.model)
        with self.recompute(), without_dropout([model]), ExitStack() as until_backward:
            with self.compute_loss_context_manager(), self.accelerator.autocast():
                columns = sink_columns(model, inputs, self.args.sink_attention, self.args.sink_position, queries)
                d = divergence(until_backward.enter_context(columns))
            loss = torch.relu(d).mean()
            scaled = loss * (self.args.lamb * backward_scale(self))
            gradients = torch.autograd.grad(scaled, self.parameters, allow_unused=True)
        if not torch.isfinite(loss):
            raise RunError(f"the sink divergence is not finite at step {self.state.global_step}; lower --learning-rate")
        add_to_grad(self, {p: g for p, g in zip(self.parameters, gradients, strict=True) if g is not None}, scale=1)
        self.note(sink_loss=loss.detach(), positive_heads=(d.detach() > 0).sum())

    def draw(self) -> tuple[list[int], list[int]]:
        """Rows whose harmful answer, and rows whose refusal, this step compares: the same without replacement, or the
        latter each of another prompt."""
        harmful = self.draws.generator.choice(len(self.harmful), self.args.pairs_per_step, replace=False).tolist()
        if self.args.pairing == "same-prompt":
            return harmful, harmful
        refusals = []
        for i in harmful:
            j = i
            while self.prompts[j] == self.prompts[i]:
                j = int(self.draws.generator.randint(len(self.refusals)))
            refusals.append(j)
        return harmful, refusals

    def require_pairs(self) -> None:
        """Raise `UsageError` unless there are enough pairs, each of two answers that differ where the model sees them
        and that have a token behind the sink."""
        if len(self.safety_data) < self.args.pairs_per_step:
            raise UsageError(
                f"there are {len(self.safety_data)} pairs and a step takes {self.args.pairs_per_step}; lower "
                "--pairs-per-step, or give more"
            )
        if self.args.pairing == "random" and len(set(self.prompts)) == 1:
            raise UsageError("pairing random needs different prompts, and all pairs have the same one")
        for number, (row, a, b) in enumerate(zip(self.safety_data, self.harmful, self.refusals, strict=True), 1):
            where, shortest = row.get("place") or "the safety data", min(len(a["input_ids"]), len(b["input_ids"]))
            if a["input_ids"] == b["input_ids"]:
                limit = min(self.args.max_length, self.context or self.args.max_length)
                raise UsageError(
                    f"{where}: the two answers of pair {number} are the same within {limit} tokens; raise "
                    "--max-length if the model's context allows, or drop the row"
                )
            if self.args.sink_queries == "common":
                starts, stops = zip(*(spans[number - 1] for spans in self.spans), strict=True)
                common = min(stop - start for start, stop in zip(starts, stops, strict=True))
                answers = [one["input_ids"][start : start + common] for one, start in zip((a, b), starts, strict=True)]
                if self.args.pairing == "same-prompt" and answers[0] == answers[1]:
                    raise UsageError(
                        f"{where}: the two answers of pair {number} are the same over the {common} tokens that both "
                        "have; drop the row, or pass --sink-queries all"
                    )
                shortest = min(starts) + common
            if shortest < self.args.sink_position + 2:
                raise UsageError(
                    f"{where}: pair {number} has a text of {shortest} tokens and sink_position is "
                    f"{self.args.sink_position}; lower --sink-position"
                )

    def require_queries_and_keys(self) -> None:
        """Raise `UsageError` unless the sink attention of this model can be read and what trains in the last block
        that does moves its heads, by a forward over a few tokens."""
        ids = self.harmful[0]["input_ids"][: self.args.sink_position + 16]
        inputs = {"input_ids": torch.tensor([ids], device=self.args.device)}
        trained = [[p for p in attention.parameters() if p.requires_grad] for attention in self.each("attention")]
        last = max((i for i, own in enumerate(trained) if own), default=None)
        moved: Sequence = ()
        columns = sink_columns(self.model, inputs, self.args.sink_attention, self.args.sink_position)
        with without_dropout([self.model]), torch.enable_grad(), columns as values:
            if last is not None and values.requires_grad:
                moved = torch.autograd.grad(values[:, last].sum(), trained[last], allow_unused=True)
        if not any(g is not None and g.any() for g in moved):
            raise UsageError(
                f"lora_targets {self.args.lora_targets!r} train no query or key projection, so no head's attention can "
                "be moved in its own block; add those, such as q_proj,k_proj"
            )

    def cost(self) -> float:
        """Compute of a step, in SFT steps, the mean so far: tokens of the job and of pairs over tokens of the job.
        Before the first step it is taken for granted that all rows are of the same length."""
        if self.args.lamb == 0:
            return 1.0
        job, pairs = self.seen
        if job == 0:
            rows = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
            return 1 + 2 * self.args.pairs_per_step / self.args.every / rows
        return 1 + pairs / job


def common_queries(
    harmful: Sequence[tuple[int, int]], refusals: Sequence[tuple[int, int]], tokens: int
) -> torch.Tensor:
    """The first m tokens of the answers of each pair, m the length of the shorter one, as booleans [rows, tokens]: of
    the harmful texts and then of as many refusals, whose answers lie at these spans."""
    lengths = [min(b - a, d - c) for (a, b), (c, d) in zip(harmful, refusals, strict=True)]
    mask = torch.zeros(2 * len(lengths), tokens, dtype=torch.bool)
    for row, ((start, _), length) in enumerate(zip([*harmful, *refusals], [*lengths, *lengths], strict=True)):
        mask[row, start : start + length] = True
    return mask


def divergence(values: torch.Tensor) -> torch.Tensor:
    """d [layers, heads] from the sink values [rows, layers, heads] of the harmful texts and then as many refusals."""
    harmful, refusal = values.chunk(2)
    return harmful.mean(0) - refusal.mean(0)
