"""One column of the attention of every head, with a graph; `tunevax.finetuning.surgery` says what it is for.

- `eager`: eager attention forms A, [rows, heads, tokens, tokens] per layer, and keeps it for the backward pass.
- `linear`: the model keeps its own attention. A[i, k] = exp(s_ik - logsumexp_j s_ij) is computed beside it from the
  very queries and keys that the attention gets (rotary embedding and norms applied), a chunk of queries at a time,
  forward and backward. Memory grows linearly with tokens, as that of SDPA and flash attention; a model that can only
  do eager attention (Gemma 2: soft cap) still forms A for its output.

Heads are query heads, also with grouped keys. In a sliding-window layer only the queries that can see k are averaged.
Learned sinks (a logit in the softmax that is no token's) are refused: rows of A do not add up to 1, and what the
first token gets is not what the paper measures.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tunevax.errors import UsageError, unknown
from tunevax.modeling.blocks import find_blocks, unwrap
from tunevax.modeling.loss import last_hidden
from tunevax.modeling.precision import wide

WAYS = ("linear", "eager")
CHUNK_ELEMENTS = {"cpu": 2**20, "elsewhere": 2**24}  # scores in a chunk: 4 MiB and 64 MiB in fp32
MIN_CHUNK_ROWS = 32
Attention = Callable[..., Any]  # what transformers calls an attention function


@contextmanager
def sink_columns(
    model: nn.Module, inputs: dict[str, torch.Tensor], how: str = "linear", sink: int = 0,
    queries: torch.Tensor | None = None,
) -> Iterator[torch.Tensor]:  # fmt: skip
    """The sink value of each head on each row, [rows, layers, heads], fp32, with a graph where gradients are on; open
    until after backward where blocks are recomputed, as they pass here again.

    Args:
        model: a causal language model, plain or wrapped, whose attention goes through transformers' interface.
        inputs: `input_ids` and `attention_mask`, [rows, tokens], padded on the right.
        how: `linear` or `eager`. The latter switches the model to eager attention and back.
        sink: position of the sink token.
        queries: the queries that are averaged, boolean, [rows, tokens]; default all after the sink.

    Raises:
        UsageError: a row has no token after the sink; the model, its attention implementation or the way it
            recomputes cannot give the values or their gradient. The message names which.
    """
    if how not in WAYS:
        raise unknown("way to the sink attention", how, WAYS)
    ids = inputs["input_ids"]
    padding = inputs.get("attention_mask", torch.ones_like(ids))
    if (padding[:, 1:] > padding[:, :-1]).any():
        raise UsageError("sink attention is read from rows padded on the right, and these are padded on the left")
    lengths = padding.sum(1)  # [rows]
    if (shortest := int(lengths.min())) < sink + 2:
        raise UsageError(f"a text of {shortest} tokens has none after the sink token at position {sink}")
    attentions = {id(block.attention): layer for layer, block in enumerate(find_blocks(model, "attention"))}
    name = type(unwrap(model)).__name__
    columns: dict[int, torch.Tensor] = {}

    def read(
        stock: Attention, module: nn.Module, query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple:
        output = stock(module, query, key, *args, **kwargs)
        if id(module) in attentions:
            mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
            weight = _query_weight(lengths, query.shape[2], mask, sink, kwargs.get("sliding_window"), queries)
            with torch.autocast(lengths.device.type, enabled=False):
                if how == "eager":
                    column = _eager_column(name, output[1], weight, sink, model)
                else:
                    column = _linear_column(name, query, key, weight, mask, sink, kwargs)
            columns.setdefault(attentions[id(module)], column)  # only the first call counts, as in `hooks.capture`
        return output

    functions: Any = type(ALL_ATTENTION_FUNCTIONS)  # where a model looks its attention function up, whichever that is
    stock_lookup = functions.get_interface
    with ExitStack() as stack:
        stack.callback(setattr, functions, "get_interface", stock_lookup)
        functions.get_interface = lambda *a, **k: functools.partial(read, stock_lookup(*a, **k))
        if how == "eager":
            stock_model = unwrap(model)
            stack.callback(stock_model.set_attn_implementation, stock_model.config._attn_implementation)
            stock_model.set_attn_implementation("eager")
        # Queries see nothing behind them, so the padding of a row is seen by padding only, and without a mask
        # SDPA takes its causal kernel instead of forming [tokens, tokens].
        last_hidden(model, {"input_ids": ids})
        if missing := [layer for layer in attentions.values() if layer not in columns]:
            raise UsageError(
                f"block {missing[0]} of {name} has an attention that does not go through transformers' attention "
                "interface, so its queries and keys cannot be read; sink attention is that of a softmax in every "
                "block, and plain sft works without"
            )
        _require_graph(model, columns)
        yield torch.stack([columns[layer] for layer in range(len(attentions))], dim=1)


def _query_weight(
    lengths: torch.Tensor, tokens: int, mask: object, sink: int, window: int | None, queries: torch.Tensor | None
) -> torch.Tensor:
    """1 / |N| for the queries in N and 0 for the others, [rows, tokens], fp32."""
    position = torch.arange(tokens, device=lengths.device)
    counted = (position > sink) & (position < lengths[:, None])
    if queries is not None:
        counted = counted & queries.to(lengths.device)
    if isinstance(mask, torch.Tensor) and mask.dim() == 4:  # boolean or additive
        seen = mask[:, 0, :, sink]
        counted = counted & (seen if seen.dtype == torch.bool else seen > torch.finfo(seen.dtype).min / 2)
    elif window:
        counted = counted & (position < sink + window)
    return counted / counted.sum(1, keepdim=True).clamp_min(1).float()


def _require_graph(model: nn.Module, columns: dict[int, torch.Tensor]) -> None:
    """Raise `UsageError` if a value that trainable weights reach came without a graph."""
    if not torch.is_grad_enabled():
        return
    below = False
    for layer, block in enumerate(find_blocks(model)):
        reached = below or (block.attention is not None and all(p.requires_grad for p in block.attention.parameters()))
        if reached and not columns[layer].requires_grad:
            raise UsageError(
                f"the sink attention of block {layer} of {type(unwrap(model)).__name__} came without a gradient, as it "
                "does under reentrant gradient checkpointing; use --checkpoint-blocks, or use_reentrant=False"
            )
        below = below or any(p.requires_grad for p in block.module.parameters())


def _eager_column(name: str, weights: object, weight: torch.Tensor, sink: int, model: nn.Module) -> torch.Tensor:
    """alpha [rows, heads] from attention weights [rows, heads, tokens, tokens]."""
    if not isinstance(weights, torch.Tensor):
        raise UsageError(
            f"{name} gave no attention weights: its attention implementation is "
            f"{unwrap(model).config._attn_implementation!r} and could not be switched to eager; use --sink-attention "
            "linear"
        )
    error = (wide(weights.detach()).sum(-1) - 1).abs().amax().item()
    if error > (1e-3 if weights.dtype in (torch.float32, torch.float64) else 2e-2):
        raise UsageError(
            f"attention weights of {name} do not add up to 1 (off by {error:.2g}): learned sinks or dropout on the "
            "attention, for which the sink divergence is not defined"
        )
    return (wide(weights[..., sink]) * weight[:, None]).sum(-1)


def _linear_column(
    name: str, query: torch.Tensor, key: torch.Tensor, weight: torch.Tensor, mask: object, sink: int, kwargs: dict
) -> torch.Tensor:
    """alpha [rows, heads] from what the attention function was given."""
    for option, what in (("s_aux", "learned sinks"), ("position_bias", "a learned position bias")):
        if kwargs.get(option) is not None:
            raise UsageError(f"the attention of {name} has {what}, for which the sink divergence is not defined")
    if mask is not None and not isinstance(mask, torch.Tensor):
        raise UsageError(f"{name} runs with attention masks of type {type(mask).__name__}; use sdpa or flash attention")
    scale = query.shape[-1] ** -0.5 if kwargs.get("scaling") is None else float(kwargs["scaling"])
    mask = mask if mask is not None and mask.dim() == 4 else None
    return _SinkMean.apply(query, key, weight, mask, sink, scale, kwargs.get("softcap"), kwargs.get("sliding_window"))


class _SinkMean(torch.autograd.Function):
    """sum_i weight_i exp(s_i,sink - logsumexp_j s_ij), [rows, heads], over chunks of queries.

    With p_i the summand's probability, c_i = g weight_i p_i and g the upstream gradient, the gradient of the scores is
    c_i (1[j = sink] - P_ij): scores are made again chunk by chunk, and only for heads whose g is not 0 (the
    regulariser's ReLU leaves out the others).
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, weight: torch.Tensor, mask: torch.Tensor | None, sink: int,
        scale: float, cap: float | None, window: int | None,
    ) -> torch.Tensor:  # fmt: skip
        rows, heads, tokens, _ = query.shape
        groups = heads // key.shape[1]
        total = wide(query.new_zeros(rows, heads))
        norms = wide(query.new_zeros(rows, heads, tokens))
        for part, first, s, _ in _scores(query, wide(key), groups, mask, sink, scale, cap, window):
            norm = norms[:, :, part] = s.logsumexp(-1)
            total += ((s[..., sink - first] - norm).exp() * weight[:, None, part]).sum(-1)
        ctx.save_for_backward(query, key, weight, norms, *([] if mask is None else [mask]))
        ctx.how = groups, sink, scale, cap, window
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple:
        query, key, weight, norms, *mask = ctx.saved_tensors
        groups, sink, scale, cap, window = ctx.how
        grad_query, grad_key = torch.zeros_like(query), torch.zeros_like(key)
        heads = upstream.ne(0).any(0).nonzero().squeeze(1)
        if len(heads) == 0:
            return (grad_query, grad_key, *[None] * 6)
        every = len(heads) == query.shape[1]
        q = query if every else query[:, heads]
        k = wide(key if every and groups == 1 else key[:, heads // groups])
        norms = norms if every else norms[:, heads]
        dk = torch.zeros_like(k).flatten(0, 1)
        for part, first, s, slope in _scores(q, k, 1, mask[0] if mask else None, sink, scale, cap, window):
            p = (s - norms[:, :, part, None]).exp_()
            c = upstream[:, heads, None] * weight[:, None, part] * p[..., sink - first] * scale
            ds = p.mul_(-c[..., None])
            ds[..., sink - first] += c
            if slope is not None:
                ds *= slope
            seen = slice(first, part.stop)
            dq = ds @ k[:, :, seen]
            if every:
                grad_query[:, :, part] = dq
            else:
                grad_query[:, heads, part] = dq.to(query.dtype)
            dk[:, seen].baddbmm_(ds.flatten(0, 1).transpose(1, 2), wide(q[:, :, part]).flatten(0, 1))
        dk = dk.unflatten(0, k.shape[:2])
        grad_key = torch.zeros_like(key, dtype=dk.dtype).index_add_(1, heads // groups, dk).to(key.dtype)
        return (grad_query, grad_key, *[None] * 6)


def _scores(
    query: torch.Tensor, key: torch.Tensor, groups: int, mask: torch.Tensor | None, sink: int, scale: float,
    cap: float | None, window: int | None,
) -> Iterator[tuple[slice, int, torch.Tensor, torch.Tensor | None]]:  # fmt: skip
    """Of each chunk of the queries that see the sink: where it is, the first key that it sees, its fp32 scores on the
    keys from there, [rows, heads, queries, keys], after scale, soft cap and mask, and the cap's slope."""
    rows, heads, tokens, size = query.shape
    elements = CHUNK_ELEMENTS.get(query.device.type, CHUNK_ELEMENTS["elsewhere"])
    length = max(MIN_CHUNK_ROWS, elements // (rows * heads * tokens))
    end = min(tokens, sink + window) if window else tokens
    for start in range(sink + 1, end, length):
        stop = min(start + length, end)
        first = max(0, start - window + 1) if window else 0
        q = wide(query[:, :, start:stop]) * scale
        s = q.reshape(rows, heads // groups, -1, size) @ key[:, :, first:stop].transpose(-1, -2)
        s, slope = s.view(rows, heads, -1, stop - first), None
        if cap:
            s = torch.tanh(s / cap)
            s, slope = s * cap, 1 - s.square()
        if mask is not None:
            part = mask[:, :, start:stop, first:stop]
            s = s.masked_fill_(~part, float("-inf")) if part.dtype == torch.bool else s + wide(part)
        else:
            begin = first if window else start  # without a window all queries see the keys before the chunk
            i = torch.arange(start, stop, device=s.device)[:, None]
            j = torch.arange(begin, stop, device=s.device)
            hidden = (j > i) | (j <= i - window) if window else j > i
            s[..., begin - first :].masked_fill_(hidden, float("-inf"))
        yield slice(start, stop), first, s, slope
