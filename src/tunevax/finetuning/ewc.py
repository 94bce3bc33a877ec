"""EWC: elastic weight consolidation on what the safety rows need (Kirkpatrick et al., arXiv 1612.00796).

    L = CE(customer) + lamb * sum_i F_i / mean(F) * (w_i - w0_i)^2,    F_i = mean_n (d CE(safety row n) / d w_i)^2

with w0 the weights before fine-tuning, where F is taken: in eval mode, one row at a time, accumulated in fp32. A square
of a batch's mean gradient, as released code has it, is another and much smaller number. With F divided by its mean,
lamb is what a plain L2 penalty of the same mean strength would have, whatever the model and the number of rows.

A fresh adapter changes nothing, B = 0, so that F of its A is zero, and w0 of its factors means little. The w here are
the weights that the adapter works on: the penalty is on dW = alpha/r * B A, with F of the merged weight W. To keep F at
full size would take 4 bytes for every weight; kept are its sums over rows and over columns,

    F_ij ~ R_i C_j / sum_i R_i,    R_i = sum_j F_ij,    C_j = sum_i F_ij,

the closest matrix of rank one (in the divergence sum F log(F/F') - F + F') and exact in both sums. The penalty is then
a trace of r x r matrices, and neither dW nor F ever has the size of W. With `full_weights` w are all weights, F is
exact, and F and w0 take 8 bytes a weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from tunevax.console import bar
from tunevax.data.encoding import collate
from tunevax.errors import UsageError, require
from tunevax.finetuning.sft import FinetuneTrainer, JobConfig
from tunevax.mixins import option
from tunevax.modeling.gradients import require_whole_weights, trained_only
from tunevax.modeling.hooks import attached, still
from tunevax.modeling.loss import response_loss
from tunevax.modeling.precision import added, wide
from tunevax.modeling.trainer import Items, PlanParts


@dataclass
class EWCConfig(JobConfig):
    """Configuration of EWC; the rest as in `JobConfig`. lamb needs a search over powers of ten."""

    lamb: float = option(0.1, "weight of the penalty, as of an L2 penalty of the same mean strength")

    def __post_init__(self) -> None:
        require(self, "lamb", at_least=0)
        super().__post_init__()

    def plan_parts(self, micro_batches: int) -> PlanParts:
        """A gradient of each safety row is taken before the first step: one stands for all."""
        return PlanParts(safety_rows=1)


class Adapted(NamedTuple):
    """A matrix with a LoRA adapter, or the fused matrices of E experts, each of which is a matrix of its own."""

    a: nn.Parameter  # [r, in]; of experts as PEFT has it, [E x r, in]
    b: nn.Parameter  # [out, r]; of experts [out, r x E]
    scale: float  # alpha / r
    rows: torch.Tensor  # sqrt(R_i), [out]; of experts [E, out]
    columns: torch.Tensor  # sqrt(C_j / sum R), [in]; of experts [E, in]


class EWCTrainer(FinetuneTrainer):
    """Fine-tuning with a quadratic penalty. The Fisher information is taken once, when the trainer is made."""

    config_class = EWCConfig
    paper = "arXiv 1612.00796"
    needs = frozenset({"task", "chosen"})
    compares = True
    off = {"lamb": 0}
    args: EWCConfig

    def prepare(self) -> None:
        """The Fisher information of the safety rows."""
        args, self.fisher_rows = self.args, 0
        if args.lamb == 0:
            return
        require_whole_weights(self)
        rows = self.encode_answers(self.safety_data, "chosen")
        batches = [self._prepare_inputs(collate([row], self.processing_class.pad_token_id)) for row in rows]
        self.fisher_rows = len(rows)
        if args.full_weights:
            self.fisher = exact_fisher(self.model, batches, self.parameters)
            total, count = sum(f.sum().item() for f in self.fisher), sum(f.numel() for f in self.fisher)
            self.start = [wide(parameter.detach()).clone() for parameter in self.parameters]
        else:
            self.adapted = factored_fisher(self.model, batches)
            total = sum(m.rows.square().sum().item() for m in self.adapted)
            count = sum(m.rows.numel() * m.columns.shape[-1] for m in self.adapted)
        if not (math.isfinite(total) and total > 0):
            raise UsageError(
                f"the Fisher information of the safety rows adds up to {total}, and nothing can be weighed by it; give "
                "other safety data, or load the model in another --dtype"
            )
        self.mean_fisher = total / count

    def compute_loss(
        self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch: Items = None
    ) -> torch.Tensor:
        """Cross entropy, and this micro-batch's share of the penalty."""
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.args.lamb == 0:
            return loss
        penalty = self.penalty()
        self.note(penalty=penalty.detach())
        return loss + self.args.lamb * penalty / self.current_gradient_accumulation_steps

    def penalty(self) -> torch.Tensor:
        """sum_i F_i / mean(F) * (w_i - w0_i)^2, in fp32."""
        if self.args.full_weights:
            parts = zip(self.fisher, self.parameters, self.start, strict=True)
            return added((f * (wide(p) - start).square()).sum() for f, p, start in parts) / self.mean_fisher
        return added(weighted_square(m) for m in self.adapted) / self.mean_fisher

    def cost(self) -> float:
        """A step, and its part of the pass over the safety rows: so many rows of the batches of the run so far."""
        args = self.args
        batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        return 1 + self.fisher_rows / batch / max(self.state.global_step, 1)


def weighted_square(m: Adapted) -> torch.Tensor:
    """sum_ij F_ij dW_ij^2 for F of rank one: the trace of (B' diag(R) B) (A diag(C) A')."""
    b, a = wide(m.b), wide(m.a)
    if m.rows.dim() == 2:  # experts, each a matrix
        count = len(m.rows)
        b, a = b.view(len(b), -1, count).permute(2, 0, 1), a.view(count, -1, a.shape[1])
    b, a = b * m.rows[..., None], a * m.columns[..., None, :]
    return m.scale**2 * ((b.mT @ b) * (a @ a.mT)).sum()


def exact_fisher(model: nn.Module, batches: Sequence[dict], weights: Sequence[nn.Parameter]) -> list[torch.Tensor]:
    """The mean over rows of the squared gradient of each weight, in fp32, of the weights' shapes."""
    sums = [wide(torch.zeros_like(weight)) for weight in weights]

    def keep(index: int, gradient: torch.Tensor) -> None:
        sums[index].add_(gradient.square(), alpha=1 / len(batches))

    per_row_gradients(model, batches, weights, keep)
    return sums


def factored_fisher(model: nn.Module, batches: Sequence[dict]) -> list[Adapted]:
    """Every matrix of a PEFT model that has an adapter, with the factors of its Fisher information.

    Raises:
        UsageError: something else has an adapter too (embeddings).
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

    layers: list[Any] = [m for m in model.modules() if isinstance(m, LoraLayer) and "default" in m.lora_A]
    weighed = {id(part["default"].weight) for layer in layers for part in (layer.lora_A, layer.lora_B)}
    other = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in weighed]
    if other:
        raise UsageError(f"ewc weighs the adapters of matrices, and {other[0]} is none; leave it out of --lora-targets")
    fused = [isinstance(layer, ParamWrapper) for layer in layers]  # parameters that are in no linear layer
    weights, rows, columns = [], [], []
    for layer, own in zip(layers, fused, strict=True):
        weight = layer.get_param() if own else layer.get_base_layer().weight
        experts = (layer.num_experts,) if own and layer.num_experts > 1 else ()
        weights.append(weight)
        rows.append(wide(weight.new_zeros(*experts, layer.out_features)))
        columns.append(wide(weight.new_zeros(*experts, layer.in_features)))

    def watch(index: int, _layer: nn.Module, args: tuple, output: torch.Tensor) -> None:
        # The weight's gradient from what goes in and what comes back: one of few bits has none of its own.
        x = args[0].detach().flatten(0, -2)
        output.register_hook(lambda gradient: add(index, wide(gradient.flatten(0, -2)).T @ wide(x)))

    def add(index: int, gradient: torch.Tensor) -> None:
        squares = gradient.square_()
        rows[index].add_(squares.sum(-1), alpha=1 / len(batches))
        columns[index].add_(squares.sum(-2), alpha=1 / len(batches))

    def keep(number: int, gradient: torch.Tensor) -> None:
        if number >= len(trained):  # a fused weight, whose layer is given more than one input
            index = places[number - len(trained)]
            transposed = gradient.dim() == 3 and getattr(layers[index].get_base_layer(), "is_transposed", False)
            add(index, gradient.mT if transposed else gradient)  # gpt-oss has [E, in, out]

    trained = [p for p in model.parameters() if p.requires_grad]
    places = [i for i, own in enumerate(fused) if own]
    with attached([layers[i].register_forward_hook(partial(watch, i)) for i, own in enumerate(fused) if not own]):
        per_row_gradients(model, batches, [*trained, *(weights[i] for i in places)], keep)
    adapted = []
    for layer, r, c in zip(layers, rows, columns, strict=True):
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        total = r.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        adapted.append(Adapted(a, b, layer.scaling["default"], r.sqrt(), (c / total).sqrt()))
    return adapted


def per_row_gradients(
    model: nn.Module, batches: Sequence[dict], weights: Sequence[nn.Parameter],
    keep: Callable[[int, torch.Tensor], None],
) -> None:  # fmt: skip
    """Call `keep(index, gradient in fp32)` for every row and weight; one gradient is alive at a time. `.grad`, what
    trains, the mode and the generators are as before."""

    def take(index: int, parameter: torch.Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        if gradient is not None:
            keep(index, wide(gradient))

    with trained_only(model.parameters(), weights), still(model), bar() as progress:
        shown = progress.add_task("fisher information", total=len(batches), note="")
        with attached([w.register_post_accumulate_grad_hook(partial(take, i)) for i, w in enumerate(weights)]):
            for batch in batches:
                response_loss(model, batch).backward()
                progress.advance(shown)
