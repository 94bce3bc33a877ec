"""Vaccine: perturbation-aware alignment (Huang et al., arXiv 2402.01109).

With e_l the output of block l's attention module (or, see `VaccineConfig.embedding`, what the block adds to its
residual stream), each step first finds the perturbation of all e_l together that raises the alignment loss most
within a budget, to first order, and then takes the gradient at the perturbed point:

    eps_l = rho * grad_{e_l} L / ||grad_e L||_2      (Eq. 1 and 3 of arXiv 2410.09760, which restates it)
    w    <- w - lr * grad_w L(e + eps)

The norm is joint over blocks, rows and tokens: rho is a budget for the whole batch. With `perturbation="random"` eps is
a Gaussian direction of the same joint norm, and there is no first pass: the control that asks whether the direction
matters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel

from tunevax.alignment.sft import SFTConfig, SFTTrainer
from tunevax.errors import require, require_one_of
from tunevax.mixins import option
from tunevax.modeling.blocks import Block
from tunevax.modeling.draws import noise_generator
from tunevax.modeling.gradients import trained_only
from tunevax.modeling.hooks import Prefix, attached, capture, perturb, tensor_of, without_dropout
from tunevax.modeling.loss import last_hidden
from tunevax.modeling.precision import added, wide
from tunevax.modeling.trainer import Items, PlanParts


@dataclass
class VaccineConfig(SFTConfig):
    """Configuration of Vaccine; the rest as in `SFTConfig`."""

    rho: float = option(2.0, "size of the perturbation: its joint L2 norm over the batch")
    perturbation: str = option("gradient", "gradient, as the paper; or random, the control: Gaussian, of the same size")
    embedding: str = option(
        "attention",
        "what e_l is: attention (the module's output, as in the papers' code), or added (what the block "
        "adds to its residual stream, which differs where a norm comes between, as in Gemma 2 and 3 and OLMo 2)",
    )
    rho_scale: str = option("total", "total, as the paper; or per-token: rho times the root of valid over reference")
    rho_reference_tokens: int = option(2000, "tokens at which per-token and total agree (the paper's batch, 10 x 200)")

    def __post_init__(self) -> None:
        require(self, "rho", at_least=0)
        require(self, "rho_reference_tokens", at_least=1)
        require_one_of(self, perturbation=("gradient", "random"), embedding=("attention", "added"))
        require_one_of(self, rho_scale=("total", "per-token"))
        super().__post_init__()

    def random_direction(self) -> dict[str, Any] | None:
        """A Gaussian direction of the same joint norm; Booster's default has no budget for one."""
        return {"perturbation": "random"} if self.rho > 0 else None

    def plan_parts(self, micro_batches: int) -> PlanParts:
        """A perturbation has its norm over a micro-batch."""
        split = "a perturbation has its norm over each part" if self.rho > 0 else "the update is the same"
        return PlanParts(split=split)

    @classmethod
    def in_one_process(cls, values: dict[str, Any], processes: int) -> None:
        """Each micro-batch has a budget of its own, and rho was the joint norm over all processes."""
        super().in_one_process(values, processes)
        if values.get("rho_scale") == "total":
            values["rho"] /= math.sqrt(processes)


class VaccineTrainer(SFTTrainer):
    """SFT whose every step is taken at the worst nearby embeddings. The only change is `training_step`."""

    config_class = VaccineConfig
    paper = "arXiv 2402.01109"
    off: ClassVar[dict[str, Any] | None] = {"rho": 0}
    replay = True  # run the blocks below the first selected one once, for both passes
    args: VaccineConfig
    kept: ClassVar[tuple[str, ...]] = ("perturbed",)
    perturbed = 0  # micro-batches given a random perturbation so far

    def prepare(self) -> None:
        """The module of each block whose output is e_l."""
        self.selected = list(range(len(self.blocks)))  # the blocks perturbed in this step, ascending
        self.embedded = self.each("attention")
        if self.args.embedding == "added" and self.parts():  # Booster alone perturbs nothing
            ids = torch.tensor([self.train_dataset[0]["input_ids"][:8]], device=self.args.device)
            self.embedded = added_by_attention(self.model, self.blocks, ids)

    def parts(self) -> tuple[str, ...]:
        """The output of each block's attention, or of what mixes tokens in its place."""
        return ("attention",)

    def first_block(self) -> int:
        """The lowest block with a graph; the blocks below it run once per step."""
        return 0

    def training_step(self, model: nn.Module, inputs: dict, num_items_in_batch: Items = None) -> torch.Tensor:
        """Two passes over the same micro-batch; the gradient of the second is the update. A random perturbation needs
        no first pass, and without a budget the step is the base's."""
        if self.args.rho == 0:
            return super().training_step(model, inputs, num_items_in_batch)
        inputs = self._prepare_inputs(inputs)
        if self.args.perturbation == "random":
            offsets = self.random_perturbation(inputs)
            with perturb({i: self.embedded[i] for i in offsets}, offsets):
                return super().training_step(model, inputs, num_items_in_batch)
        prefix = Prefix([b.module for b in self.blocks], self.first_block())
        pass1_loss, offsets = self.perturbation(model, inputs, num_items_in_batch, prefix)
        with perturb(dict(enumerate(self.embedded)), offsets), prefix.replay() if self.replay else nullcontext():
            loss = super().training_step(model, inputs, num_items_in_batch)  # the hooks outlive its backward
        # Each micro-batch of each rank is a share; over ranks their mean, over micro-batches their sum is the loss.
        shares = torch.stack([pass1_loss * self.loss_scale(num_items_in_batch), loss])
        before, after = self.accelerator.reduce(shares, "mean") * self.current_gradient_accumulation_steps
        self.note(pass1_loss=before, sharpness=after - before)
        return loss

    def perturbation(
        self, model: nn.Module, inputs: dict, num_items: Items, prefix: Prefix
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """Pass 1: the alignment loss and eps_l for each selected block, [batch, tokens, hidden].

        At padded positions eps is zero because the gradient is: nothing attends to them.
        """
        model.train()
        chosen = self.selected
        with (
            self.recompute(),
            trained_only(self.parameters),  # a pass for activations stores nothing for weights
            prefix.record() if self.replay else nullcontext(),
            capture({i: self.embedded[i] for i in chosen}, leaf=chosen[0]) as outputs,
            self.compute_loss_context_manager(),
        ):
            # The unwrapped model: no rank may wait for gradients that this pass does not produce. And this rank's
            # share of the loss, not scaled for DDP's mean: the shares add up to the gradient of the global batch.
            loss = self.batch_loss(self.accelerator.unwrap_model(model), inputs, num_items)
            gradients = torch.autograd.grad(loss, [outputs[i] for i in chosen])
        # One process with the whole batch and many with a share each must agree on the norm.
        norm = self.accelerator.reduce(added(wide(g).square().sum() for g in gradients), "sum").sqrt()
        scale = self.budget(inputs) / (norm + 1e-7)  # Eq. 6
        self.note(embedding_grad_norm=norm)
        return loss.detach(), {i: wide(g).mul_(scale) for i, g in zip(chosen, gradients, strict=True)}

    def random_perturbation(self, inputs: dict) -> dict[int, torch.Tensor]:
        """A Gaussian direction over the valid tokens of each selected block, [batch, tokens, hidden], with the joint
        norm that eps_l has; zero at padded positions."""
        mask = inputs["attention_mask"]
        generator = noise_generator(self, self.perturbed, mask.device)
        self.perturbed += 1
        shape = (*mask.shape, self.model.config.get_text_config().hidden_size)
        noise = [torch.randn(shape, generator=generator, device=mask.device) * mask[..., None] for _ in self.selected]
        norm = self.accelerator.reduce(added(n.square().sum() for n in noise), "sum").sqrt()
        scale = self.budget(inputs) / norm
        return {i: n.mul_(scale) for i, n in zip(self.selected, noise, strict=True)}

    def budget(self, inputs: dict) -> float | torch.Tensor:
        """rho, or rho rescaled to the number of valid tokens of the global batch."""
        if self.args.rho_scale == "total":
            return self.args.rho
        tokens = self.accelerator.reduce(inputs["attention_mask"].sum().float(), "sum")
        return self.args.rho * (tokens / self.args.rho_reference_tokens).sqrt()

    def cost(self) -> float:
        """Compute of a step, in SFT steps: 2, or 1 with a random perturbation or none (5/3 and 1 with full weights)."""
        return self.step_cost()

    def step_cost(self, above: float = 1.0, trained: float = 1.0, reach: float = 1.0) -> float:
        """Compute of a step, in SFT steps, when a share `above` of the blocks has a graph in pass 1 and `reach` in
        pass 2, of which `trained` trains.

        In forwards of all blocks, F, each backward through frozen weights being one more: pass 1 is F + above F, pass 2
        is 2 reach F, SFT is 2 F. The weight gradients of a block cost another forward of it, those of an adapter
        nothing. Not counted on either side: recomputation, which buys memory, the embeddings and the head.
        """
        first_pass = self.args.perturbation == "gradient" and self.args.rho > 0
        both = 1 + above + 2 * reach if first_pass else 1 + reach
        weights = 1 if self.args.full_weights else 0
        return (both + weights * trained) / (2 + weights)


def added_by_attention(model: PreTrainedModel, blocks: Sequence[Block], ids: torch.Tensor) -> list[torch.nn.Module]:
    """Of each block the module whose output is what its attention adds to the residual stream: the norm that is given
    the attention's very output, or else the attention. Seen in a forward pass over `ids`, [1, tokens].

    A norm takes the size of what it is given away, so that before it e_l, its gradient and every p_l are in a unit of
    their own in each block.
    """
    chosen = [block.attention for block in blocks if block.attention is not None]
    outputs: dict[int, torch.Tensor] = {}

    def attended(i: int, _module: torch.nn.Module, _args: object, output: torch.Tensor | tuple) -> None:
        outputs[i] = tensor_of(output)

    def normed(i: int, module: torch.nn.Module, args: tuple) -> None:
        if args and i in outputs and args[0] is outputs[i]:
            chosen[i] = module

    handles = []
    for i, block in enumerate(blocks):
        handles.append(chosen[i].register_forward_hook(partial(attended, i)))
        norms = [m for m in block.module.children() if "Norm" in type(m).__name__]
        handles += [m.register_forward_pre_hook(partial(normed, i)) for m in norms]
    with attached(handles), torch.no_grad(), without_dropout([model]):
        last_hidden(model, {"input_ids": ids})
    return chosen
