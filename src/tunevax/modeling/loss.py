"""Cross entropy on the response only, never holding logits of shape [batch, tokens, vocabulary].

The head of the model is entered with one row; its input is taken from there, cut to the positions that have a
label, and multiplied by the head in chunks whose gradient is computed at once and added up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tunevax.errors import UsageError
from tunevax.modeling.blocks import unwrap
from tunevax.modeling.precision import wide

CHUNK_ELEMENTS = 2**19  # logits in a chunk: 2 MiB in fp32
MIN_CHUNK_ROWS = 64


def response_loss(
    model: nn.Module, inputs: dict[str, torch.Tensor], num_items: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Mean next-token cross entropy over the positions with a label (`labels != -100`), a scalar in fp32 with a graph.

    Args:
        model: a causal language model, plain or wrapped (PEFT, DDP).
        inputs: `input_ids`, `attention_mask`, `labels`, each [batch, tokens].
        num_items: what to divide the sum by; default the number of labels in this batch.
    """
    positions, targets = labelled(inputs["labels"])
    if positions.numel() == 0:
        raise UsageError("a batch has no response token to train on; raise max_length or check the data")
    hidden = last_hidden(model, {k: v for k, v in inputs.items() if k != "labels"})
    scale = wide(hidden.new_ones(())) / (positions.numel() if num_items is None else num_items)
    return head_loss(model, rows_at(hidden, positions), targets, scale)


def labelled(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of labels [batch, tokens]: where the labelled tokens are predicted from, for `rows_at`, and their ids."""
    labels = labels[:, 1:].reshape(-1)
    positions = (labels != -100).nonzero().squeeze(1)
    return positions, labels.index_select(0, positions)


def rows_at(hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Of hidden states [batch, tokens, hidden] those at positions that `labelled` gave, [rows, hidden]."""
    return hidden[:, :-1].reshape(-1, hidden.shape[-1]).index_select(0, positions)


def row_losses(
    model: nn.Module, inputs: dict[str, torch.Tensor], weights: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean cross entropy of each row over its labels, in fp32: the sum over rows, weighted by `weights` [batch]
    (default 1 each), a scalar with a graph; and the rows' own losses, [batch], without one. `inputs` are those of
    `response_loss`; every row has a label."""
    positions, targets = labelled(inputs["labels"])
    rows = positions // (inputs["labels"].shape[1] - 1)
    batch = len(inputs["labels"])
    hidden = last_hidden(model, {k: v for k, v in inputs.items() if k != "labels"})
    share = wide(hidden.new_ones(())) / torch.bincount(rows, minlength=batch)  # of a token in its row
    scale = share if weights is None else share * weights
    each = wide(hidden.new_empty(len(targets)))
    total = head_loss(model, rows_at(hidden, positions), targets, scale[rows], each)
    return total, each.new_zeros(batch).index_add_(0, rows, each * share[rows])


def head_loss(
    model: nn.Module, hidden: torch.Tensor, targets: torch.Tensor, scale: torch.Tensor | float = 1.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Sum of the cross entropies of the head's predictions from head inputs [rows, hidden], times `scale` (a number,
    or one for each of the rows), in fp32. `out`, [rows], receives the cross entropies themselves."""
    stock = unwrap(model)
    weights = [p for p in stock.get_output_embeddings().parameters() if p.requires_grad]
    return _ChunkedCrossEntropy.apply(hidden, targets, scale, out, stock, *weights)


def last_hidden(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The head's input, [batch, tokens, hidden], from a forward through `model` itself (so that wrappers such as
    DDP see it), in which the head computes a single row."""
    caught: list[torch.Tensor] = []

    def hook(_head: nn.Module, args: tuple) -> tuple:
        caught.append(args[0])
        return (args[0][:1, :1], *args[1:])

    with unwrap(model).get_output_embeddings().register_forward_pre_hook(hook):
        model(**inputs, use_cache=False)
    return caught[0]


def logits_of(model: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """The model's logits for head inputs [rows, hidden], in fp32, with the model's own soft cap and scale."""
    stock = unwrap(model)
    config = stock.config.get_text_config()
    logits = wide(stock.get_output_embeddings()(hidden))
    for name in ("logit_scale", "lm_head_multiplier"):  # Cohere; Falcon-H1
        if scale := getattr(config, name, None):
            logits = logits * scale
    if scale := getattr(config, "logits_scaling", None):  # Granite; HyperCLOVA X has it the other way round
        logits = logits * scale if config.model_type == "hyperclovax" else logits / scale
    for name in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"):  # Gemma 2; Griffin; xLSTM
        if cap := getattr(config, name, None):
            logits = torch.tanh(logits / cap) * cap
    return logits


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of the cross entropies times `scale`. The gradient of each chunk is taken as soon as its logits exist,
    so that one chunk of logits is alive at a time; backward only multiplies by the upstream scalar."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, targets: torch.Tensor, scale: torch.Tensor | float, out: torch.Tensor | None,
        model: nn.Module, *weights: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        needs_hidden = ctx.needs_input_grad[0]
        sources = [w for w, need in zip(weights, ctx.needs_input_grad[5:], strict=True) if need]
        by_row = scale if isinstance(scale, torch.Tensor) and scale.dim() == 1 else None
        ctx.grads = [torch.zeros_like(w) for w in sources]
        ctx.grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        loss = wide(hidden.new_zeros(()))
        size = max(MIN_CHUNK_ROWS, CHUNK_ELEMENTS // unwrap(model).config.get_text_config().vocab_size)
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            chunk = hidden[rows].detach().requires_grad_(needs_hidden)
            with torch.set_grad_enabled(needs_hidden or bool(sources)):
                reduction = "sum" if by_row is None and out is None else "none"
                value = nn.functional.cross_entropy(logits_of(model, chunk), targets[rows], reduction=reduction)
                if out is not None:
                    out[rows] = value.detach()
                value = (value * (scale if by_row is None else by_row[rows])).sum()
            loss += value.detach()
            if not value.requires_grad:
                continue
            gradients = list(torch.autograd.grad(value, [chunk] * needs_hidden + sources))
            if needs_hidden:
                ctx.grad_hidden[rows] = gradients.pop(0)
            for total, grad in zip(ctx.grads, gradients, strict=True):
                total += grad
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple:
        grad_hidden = None if ctx.grad_hidden is None else ctx.grad_hidden * upstream
        grads = iter(ctx.grads)
        own = [next(grads) * upstream if need else None for need in ctx.needs_input_grad[5:]]
        return (grad_hidden, *[None] * 4, *own)
