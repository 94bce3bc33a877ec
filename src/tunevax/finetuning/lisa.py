"""Lisa: lazy safety alignment by a bi-state optimisation with a proximal term (Huang et al., arXiv 2405.18641).

The same weights and the same optimiser alternate between two states:

    alignment state, K1 steps:     min_w  CE(safety rows)    + rho/2 * ||w - w_ft||^2
    fine-tuning state, K2 steps:   min_w  CE(customer rows)  + rho/2 * ||w - w_al||^2

w_ft are the weights at the last switch from the fine-tuning state, w_al at the last switch from the alignment state:
in either, the weights at which the present state began. A run begins in the alignment state, at its first step that
moves anything.

What differs from the released code:

- A step is a customer's step. Before each K2 of them come K1 alignment steps, which take no batch from the customer:
  `max_steps`, epochs, the schedule and the order of the customer's rows are those of plain fine-tuning, and no row of
  theirs is thrown away. A run of S steps has K1 * ceil((S - f) / K2) alignment steps beside them, where f are the steps
  before the first alignment.
- An alignment step has the learning rate of the customer's step it comes before. A warm-up starts from zero, where
  they would move nothing: the first K1 come before the customer's first step of a learning rate above zero (f = 1 with
  a warm-up, 0 without), and the next before every K2-th from there. A run shorter than K2 has these K1 only.
- The proximal term is there from the first step that moves anything, and its anchors are fp32.

With a fresh adapter the distance is between adapters, from a start that changes nothing: between what they do to the
model only in so far as their factors stay close.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tunevax.errors import require
from tunevax.finetuning.sft import FinetuneTrainer, JobConfig
from tunevax.mixins import option
from tunevax.modeling.draws import Draws
from tunevax.modeling.gradients import labels_in, require_whole_weights
from tunevax.modeling.memory import mark
from tunevax.modeling.precision import added, wide
from tunevax.modeling.trainer import Items, PlanParts

ANCHOR = "lisa_anchor.safetensors"
SYNC = "require_backward_grad_sync"  # what DDP calls its switch


@dataclass
class LisaConfig(JobConfig):
    """Configuration of Lisa, with the released code's values; the rest as in `JobConfig`. K2 should fit several
    times into the run, or the only alignment is at its start."""

    k1: int = option(100, "alignment steps at each switch; 0 is plain fine-tuning")
    k2: int = option(900, "steps on the customer's rows between switches")
    rho: float = option(1.0, "weight of the distance to the weights at the last switch")

    def __post_init__(self) -> None:
        require(self, "k1", "rho", at_least=0)
        require(self, "k2", at_least=1)
        super().__post_init__()

    def plan_parts(self, micro_batches: int) -> PlanParts:
        """One alignment step of the K1 that come with every K2."""
        return PlanParts({"k1": 1}, {"align": self.k1 / self.k2}) if self.k1 else PlanParts()


class LisaTrainer(FinetuneTrainer):
    """Fine-tuning that returns to the safety rows every `k2` steps."""

    config_class = LisaConfig
    paper = "arXiv 2405.18641"
    needs = frozenset({"task", "chosen"})
    off = {"k1": 0}
    args: LisaConfig
    kept = ("draws", "alignment_steps", "first")  # the anchor has a file of its own

    def prepare(self) -> None:
        """Safety rows, and a generator for their batches."""
        if self.args.k1:
            require_whole_weights(self)
        self.safe = self.encode_answers(self.safety_data, "chosen")
        self.draws = Draws(self.args.seed)
        self.draws.require(self, len(self.safe), "safety rows")
        self.anchor: list[torch.Tensor] | None = None  # fp32, one per trainable tensor
        self.first: int | None = None  # the customer's step before which the first alignment came
        self.alignment_steps = 0

    def training_step(self, model: nn.Module, inputs: dict, num_items_in_batch: Items = None) -> torch.Tensor:
        """The customer's step; before the first micro-batch of every `k2`-th from the first that moves anything, the
        alignment state."""
        step = self.state.global_step
        if self.args.k1 and self.ready_for != step:
            moves = self._get_learning_rate() > 0
            if self.first is None and moves:
                self.first = step
            if self.first is not None and (step - self.first) % self.args.k2 == 0:
                self.switch()
                if moves:
                    self.align(model)
                self.switch()
            self.ready_for = step
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch: Items = None
    ) -> torch.Tensor:
        """Cross entropy, and this micro-batch's share of rho/2 * ||w - anchor||^2."""
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.anchor is None or self.args.rho == 0:
            return loss
        pairs = zip(self.parameters, self.anchor, strict=True)
        distance = added((wide(parameter) - anchor).square().sum() for parameter, anchor in pairs)
        self.note(distance=distance.detach())
        return loss + self.args.rho / 2 * distance / self.current_gradient_accumulation_steps

    def switch(self) -> None:
        """Anchor the coming state at the weights of now."""
        self.anchor = [wide(parameter.detach()).clone() for parameter in self.parameters]
        mark("copies", self.anchor)

    def align(self, model: nn.Module) -> None:
        """K1 steps of the optimiser on safety rows, each as large as the customer's."""
        # Of the customer's accumulation this is the first micro-batch, at which accelerate's optimiser would not step
        # and DDP, held by `no_sync`, would leave each rank its own gradients.
        sync = self.accelerator.gradient_state
        before, reduces = sync.sync_gradients, getattr(model, SYNC, None)
        try:
            sync._set_sync_gradients(True)
            for _ in range(self.args.k1):
                batches = self.draws.batches(self, self.safe)
                items = labels_in(self, batches)
                losses = []
                for number, batch in enumerate(batches, 1):
                    if reduces is not None:
                        setattr(model, SYNC, number == len(batches))
                    losses.append(super().training_step(model, batch, items))
                if self.args.max_grad_norm > 0:
                    self._clip_grad_norm(model)
                self.optimizer.step()
                model.zero_grad()
                self.alignment_steps += 1
                self.note(alignment_loss=sum(losses))
        finally:
            sync._set_sync_gradients(before)
            if reduces is not None:
                setattr(model, SYNC, reduces)

    def cost(self) -> float:
        """Compute of a customer's step, in SFT steps: its own, and its part of the alignment steps so far."""
        return 1 + self.alignment_steps / max(self.state.global_step, 1)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.args.should_save and self.anchor is not None:
            save_file({str(i): anchor for i, anchor in enumerate(self.anchor)}, str(Path(output_dir, ANCHOR)))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and (file := Path(checkpoint, ANCHOR)).is_file():
            kept = load_file(str(file))
            self.anchor = [kept[str(i)].to(p.device) for i, p in enumerate(self.parameters)]
