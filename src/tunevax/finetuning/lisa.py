"""Lisa: lazy safety alignment by a bi-state optimisation with a proximal term (Huang et al., arXiv 2405.18641).

The same weights and the same optimiser alternate between two states:

    alignment state, K1 steps:     min_w  CE(safety rows)    + rho/2 * ||w - w_ft||^2
    fine-tuning state, K2 steps:   min_w  CE(customer rows)  + rho/2 * ||w - w_al||^2

w_ft are the weights at the last switch from the fine-tuning state, w_al at the last switch from the alignment state:
in either, the weights at which the present state began. A run begins in the alignment state.

What differs from the released code:

- A step is a customer's step. Before each K2 of them come K1 alignment steps, which take no batch from the customer:
  `max_steps`, epochs, the schedule and the order of the customer's rows are those of plain fine-tuning, and no row of
  theirs is thrown away. A run of S steps has K1 * ceil(S / K2) alignment steps beside them.
- An alignment step has the learning rate of the customer's step it comes before. Where a warm-up starts from zero, the
  first K1 would move nothing, and are left out.
- The proximal term is there from the first step, and its anchors are fp32.

With a fresh adapter the distance is between adapters, from a start that changes nothing: between what they do to the
model only in so far as their factors stay close.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tunevax.errors import UsageError
from tunevax.finetuning.sft import Draws, FinetuneConfig, FinetuneTrainer

ANCHOR = "lisa_anchor.safetensors"


@dataclass
class LisaConfig(FinetuneConfig):
    """Configuration of Lisa, with the released code's values; the rest as in `FinetuneConfig`. K2 should fit several
    times into the run, or there is one switch only."""

    k1: int = field(default=100, metadata={"help": "alignment steps at each switch; 0 is plain fine-tuning"})
    k2: int = field(default=900, metadata={"help": "steps on the customer's rows between switches"})
    rho: float = field(default=1.0, metadata={"help": "weight of the distance to the weights at the last switch"})

    def __post_init__(self) -> None:
        for name, least in (("k1", 0), ("k2", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if not (math.isfinite(self.rho) and self.rho >= 0):
            raise UsageError(f"rho is {self.rho}; it must be a finite number, 0 or more")
        super().__post_init__()


class LisaTrainer(FinetuneTrainer):
    """Fine-tuning that returns to the safety rows every `k2` steps."""

    config_class = LisaConfig
    paper = "arXiv 2405.18641"
    needs = ("chosen",)

    def __init__(
        self,
        model: Any,
        args: LisaConfig,
        task_data: Sequence[dict],
        processing_class: Any,
        safety_data: Sequence[dict] | None = None,
        callbacks: list | None = None,
    ) -> None:
        super().__init__(model, args, task_data, processing_class, safety_data, callbacks)
        if args.k1 and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise UsageError("lisa keeps a copy of whole weights, so it runs without FSDP and DeepSpeed")
        self.draws = Draws(self, self.encode_answers(safety_data, "chosen"))
        self.anchor: list[torch.Tensor] | None = None  # fp32, one per trainable tensor
        self.alignment_steps = 0

    def training_step(self, model: Any, inputs: dict, num_items_in_batch: torch.Tensor | None = None) -> torch.Tensor:
        """The customer's step; before the first micro-batch of every `k2`-th, the alignment state."""
        if self.args.k1 and self.ready_for != self.state.global_step:
            if self.state.global_step % self.args.k2 == 0:
                self.switch()
                if self._get_learning_rate() > 0:
                    self.align(model)
                self.switch()
            self.ready_for = self.state.global_step
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self, model: Any, inputs: dict, return_outputs: bool = False, num_items_in_batch: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Cross entropy, and this micro-batch's share of rho/2 * ||w - anchor||^2."""
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.anchor is None or self.args.rho == 0:
            return loss
        pairs = zip(self.parameters, self.anchor, strict=True)
        distance = sum((parameter.float() - anchor).square().sum() for parameter, anchor in pairs)
        self.note(distance=distance.detach())
        return loss + self.args.rho / 2 * distance / self.current_gradient_accumulation_steps

    def switch(self) -> None:
        """Anchor the coming state at the weights of now."""
        self.anchor = [parameter.detach().float().clone() for parameter in self.parameters]

    def align(self, model: Any) -> None:
        """K1 steps of the optimiser on safety rows, each as large as the customer's."""
        # Of the customer's accumulation this is the first micro-batch, at which accelerate's optimiser would not step.
        sync = self.accelerator.gradient_state
        before = sync.sync_gradients
        sync._set_sync_gradients(True)
        for _ in range(self.args.k1):
            batches = self.draws.batches()
            items = self.accelerator.reduce(sum((b["labels"][:, 1:] != -100).sum() for b in batches), "sum")
            losses = [super(LisaTrainer, self).training_step(model, batch, items) for batch in batches]
            if self.args.max_grad_norm > 0:
                self._clip_grad_norm(model)
            self.optimizer.step()
            model.zero_grad()
            self.alignment_steps += 1
            self.note(alignment_loss=sum(losses))
        sync._set_sync_gradients(before)

    def cost(self) -> float:
        """Compute of a customer's step, in SFT steps: its own, and its part of the alignment steps so far."""
        return 1 + self.alignment_steps / max(self.state.global_step, 1)

    def method_state(self) -> dict[str, Any]:
        """The generator of the safety rows and the steps so far; the anchor has a file of its own."""
        return {**super().method_state(), "draws": self.draws.state(), "alignment_steps": self.alignment_steps}

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Take back the generator and the steps."""
        super().load_method_state(state)
        self.draws.load(state["draws"])
        self.alignment_steps = state["alignment_steps"]

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.args.should_save and self.anchor is not None:
            save_file({str(i): anchor for i, anchor in enumerate(self.anchor)}, str(Path(output_dir, ANCHOR)))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and (file := Path(checkpoint, ANCHOR)).is_file():
            kept = load_file(str(file))
            self.anchor = [kept[str(i)].to(p.device) for i, p in enumerate(self.parameters)]
