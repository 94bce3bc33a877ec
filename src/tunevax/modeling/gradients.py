"""Gradients beside that of `backward()`: of other batches, at other weights, over all processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tunevax.errors import UsageError
from tunevax.methods import name_of
from tunevax.modeling.hooks import without_dropout
from tunevax.modeling.precision import added, wide

if TYPE_CHECKING:
    from tunevax.modeling.trainer import ResponseTrainer

Gradient = dict[torch.nn.Parameter, torch.Tensor]


def labels_in(trainer: ResponseTrainer, batches: Sequence[dict[str, torch.Tensor]]) -> torch.Tensor:
    """The labels in all of these batches and all processes, which a token-mean is over."""
    return trainer.accelerator.reduce(added((b["labels"][:, 1:] != -100).sum() for b in batches), "sum")


def gradient_of(
    trainer: ResponseTrainer, batches: Sequence[Any], share: Callable[[nn.Module, Any], torch.Tensor] | None = None
) -> tuple[torch.Tensor, Gradient]:
    """The sum of `share(model, batch)` over micro-batches and processes, by default the token-mean cross entropy of all
    of them, and its gradient. `.grad` is not touched, there is no dropout, and no global generator moves."""
    items = labels_in(trainer, batches) if share is None else None
    model = trainer.accelerator.unwrap_model(trainer.model)
    losses: list[torch.Tensor] = []
    gradient: Gradient = {}
    for batch in batches:
        with trainer.recompute(), without_dropout([model]):
            # The weights change between calls, so none may see the casts that autocast keeps until it ends.
            with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
                loss = share(model, batch) if share else trainer.batch_loss(model, batch, items)
            grads = torch.autograd.grad(loss, trainer.parameters, allow_unused=True)
        losses.append(loss.detach())
        for parameter, g in zip(trainer.parameters, grads, strict=True):
            if g is not None:
                gradient[parameter] = gradient[parameter] + g if parameter in gradient else g
    total = added(losses)
    if trainer.args.world_size > 1:  # not for one process: reducing copies
        total = trainer.accelerator.reduce(total, "sum")
        gradient = {parameter: trainer.accelerator.reduce(g, "sum") for parameter, g in gradient.items()}
    return total, gradient


def norm_of(gradient: Gradient) -> torch.Tensor:
    """One joint L2 norm over all tensors, in fp32."""
    return added(wide(g).square().sum() for g in gradient.values()).sqrt()


def backward_scale(trainer: ResponseTrainer) -> float:
    """What the gradients of `backward()` are multiplied by: the loss scale of fp16, 1 without it."""
    scaler = trainer.accelerator.scaler
    return 1.0 if scaler is None else scaler.get_scale()


def add_to_grad(trainer: ResponseTrainer, gradient: Gradient, scale: float | None = None) -> None:
    """Add a gradient that is the same on every process to `.grad`, times `scale` (default that of `backward()`)."""
    scale = backward_scale(trainer) if scale is None else scale
    for parameter, g in gradient.items():
        g = g if scale == 1 else g * scale
        parameter.grad = g if parameter.grad is None else parameter.grad + g


@contextmanager
def restored(parameters: Sequence[torch.nn.Parameter]) -> Iterator[None]:
    """Restore weights and `.grad` on exit, by copy: adding back what was subtracted does not give the same bits."""
    kept = [(parameter.detach().clone(), parameter.grad) for parameter in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, (weight, grad) in zip(parameters, kept, strict=True):
                parameter.copy_(weight)
                parameter.grad = grad


@contextmanager
def trained_only(parameters: Iterable[nn.Parameter], weights: Sequence[nn.Parameter] = ()) -> Iterator[None]:
    """Of these parameters only `weights` require grad; what did before comes back."""
    before = [(parameter, parameter.requires_grad) for parameter in parameters]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        for parameter, needed in before:
            parameter.requires_grad_(needed)


def require_whole_weights(trainer: ResponseTrainer) -> None:
    """Raise `UsageError` where a process holds a shard of the weights only."""
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise UsageError(f"{name_of(type(trainer))} works on whole weights, so it runs without FSDP and DeepSpeed")
