"""Booster: attenuating the gain of a harmful step (Huang et al., arXiv 2409.01586).

With f the alignment loss and h the loss of the harmful answers, alignment should leave little to win by one normalised
step on h:

    min_w  f(w) + lamb * (h(w) - h(w+)),    w+ = w - alpha * grad h(w) / ||grad h(w)||_2
    update:  grad f(w) + lamb * (grad h(w) - grad h(w+))

The update leaves out how w+ moves with w. At the paper's alpha that is no small part: take it as a rule of its own
rather than as the gradient of the objective. h and w+ belong to the harmful batch of the whole optimiser step, however
many micro-batches and processes it is spread over. With `rho` > 0 the alignment gradient is Vaccine's, the variant that
the paper calls Vaccine+Booster.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from tunevax.alignment.vaccine import VaccineConfig, VaccineTrainer
from tunevax.errors import RunError, require
from tunevax.mixins import option
from tunevax.modeling.draws import Draws
from tunevax.modeling.gradients import Gradient, add_to_grad, gradient_of, norm_of, require_whole_weights, restored
from tunevax.modeling.trainer import Items


@dataclass
class BoosterConfig(VaccineConfig):
    """Configuration of Booster; the rest as in `VaccineConfig`. Default that differs from it: `rho=0.0`."""

    rho: float = option(0.0, "size of Vaccine's perturbation on top; 0 is Booster alone")
    lamb: float = option(5.0, "weight of what a harmful step would win")
    alpha: float = option(0.1, "length of the simulated harmful step")

    def __post_init__(self) -> None:
        require(self, "lamb", "alpha", at_least=0)
        super().__post_init__()


class BoosterTrainer(VaccineTrainer):
    """SFT (or Vaccine) with a second gradient, added once per optimiser step."""

    config_class = BoosterConfig
    paper = "arXiv 2409.01586"
    needs = frozenset({"chosen", "rejected"})
    different = True
    off = {"lamb": 0}
    args: BoosterConfig
    kept = (*VaccineTrainer.kept, "draws")

    def prepare(self) -> None:
        """Harmful rows, and a generator for their batches."""
        super().prepare()
        require_whole_weights(self)
        self.harmful = self.encode_answers(self.safety_data, "rejected")
        self.draws = Draws(self.args.seed)
        self.draws.require(self, len(self.harmful), "harmful rows")

    def parts(self) -> tuple[str, ...]:
        """As Vaccine, with its perturbation on top; else none."""
        return super().parts() if self.args.rho > 0 else ()

    def training_step(self, model: nn.Module, inputs: dict, num_items_in_batch: Items = None) -> torch.Tensor:
        """The first micro-batch of a step adds lamb * (grad h(w) - grad h(w+)); every one adds its grad f(w)."""
        if self.ready_for != self.state.global_step:
            add_to_grad(self, self.harmful_gradient())
            self.ready_for = self.state.global_step
        return super().training_step(model, inputs, num_items_in_batch)

    def harmful_gradient(self) -> Gradient:
        """lamb * (grad h(w) - grad h(w+)) on a fresh harmful batch. The weights come back bit for bit."""
        batches = self.draws.batches(self, self.harmful)
        h, gradient = gradient_of(self, batches)
        norm = norm_of(gradient)
        if not torch.isfinite(norm):
            raise RunError(
                f"the harmful gradient is not finite at step {self.state.global_step}; lower --learning-rate or --lamb"
            )
        with restored(self.parameters):
            with torch.no_grad():
                for parameter, g in gradient.items():
                    parameter.sub_(g * (self.args.alpha / (norm + 1e-7)))
            h_plus, after = gradient_of(self, batches)
        difference = {parameter: g.sub_(after[parameter]).mul_(self.args.lamb) for parameter, g in gradient.items()}
        if not torch.isfinite(norm_of(difference)):
            raise RunError(
                f"the gradient after the harmful step is not finite at step {self.state.global_step}; lower --alpha"
            )
        # h going up is the price of the method: rising without end is a model that falls apart on harmful text.
        self.note(harmful_loss=h, harmful_loss_after=h_plus, harmful_grad_norm=norm)
        return difference

    def cost(self) -> float:
        """Compute of a step, in SFT steps: 2 for the harmful batch, and 1 (with `rho` Vaccine's 2) as ever."""
        return 2 + super().cost()
