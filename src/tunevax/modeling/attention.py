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

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
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
    lengths = _lengths(inputs, sink)
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

    with _attention_read(read), _eager(model) if how == "eager" else nullcontext():
        # Queries see nothing behind them, so the padding of a row is seen by padding only, and without a mask
        # SDPA takes its causal kernel instead of forming [tokens, tokens].
        last_hidden(model, {"input_ids": inputs["input_ids"]})
        missing = [layer for layer in attentions.values() if layer not in columns]
        if missing:
            raise UsageError(
                f"block {missing[0]} of {name} has an attention that does not go through transformers' attention "
                "interface, so its queries and keys cannot be read; sink attention is that of a softmax in every "
                "block, and plain sft works without"
            )
        _require_graph(model, columns)
        yield torch.stack([columns[layer] for layer in range(len(attentions))], dim=1)


@contextmanager
def _attention_read(read: Attention) -> Iterator[None]:
    """Call `read(stock, ...)` in place of the attention function that a model looks up, whichever that is."""
    stock_lookup = ALL_ATTENTION_FUNCTIONS.get_interface

    def lookup(attn_implementation: str, default: Attention) -> Attention:
        stock = stock_lookup(attn_implementation, default)
        return lambda *a, **k: read(stock, *a, **k)

    setattr(ALL_ATTENTION_FUNCTIONS, "get_interface", lookup)  # noqa: B010  on the instance: the class's own comes back by deleting it
    try:
        yield
    finally:
        if getattr(stock_lookup, "__func__", None) is type(ALL_ATTENTION_FUNCTIONS).get_interface:
            del ALL_ATTENTION_FUNCTIONS.get_interface
        else:
            setattr(ALL_ATTENTION_FUNCTIONS, "get_interface", stock_lookup)  # noqa: B010


@contextmanager
def _eager(model: nn.Module) -> Iterator[None]:
    stock = unwrap(model)
    before = stock.config._attn_implementation
    stock.set_attn_implementation("eager")
    try:
        yield
    finally:
        stock.set_attn_implementation(before)


def _lengths(inputs: dict[str, torch.Tensor], sink: int) -> torch.Tensor:
    """Tokens of each row, [rows]."""
    mask = inputs.get("attention_mask")
    if mask is None:
        mask = torch.ones_like(inputs["input_ids"])
    if (mask[:, 1:] > mask[:, :-1]).any():
        raise UsageError("sink attention is read from rows padded on the right, and these are padded on the left")
    lengths = mask.sum(1)
    if int(lengths.min()) < sink + 2:
        raise UsageError(f"a text of {int(lengths.min())} tokens has none after the sink token at position {sink}")
    return lengths


def _query_weight(
    lengths: torch.Tensor, tokens: int, mask: object, sink: int, window: int | None, queries: torch.Tensor | None
) -> torch.Tensor:
    """1 / |N| for the queries in N and 0 for the others, [rows, tokens], fp32."""
    position = torch.arange(tokens, device=lengths.device)
    counted = (position > sink) & (position < lengths[:, None])
    if queries is not None:
        counted = counted & queries.to(lengths.device)
    if isinstance(mask, torch.Tensor) and mask.dim() == 4:
        counted = counted & _visible(mask)[:, 0, :, sink]
    elif window:
        counted = counted & (position < sink + window)
    return counted / counted.sum(1, keepdim=True).clamp_min(1).float()


def _visible(mask: torch.Tensor) -> torch.Tensor:
    """A boolean or additive attention mask as True where a key is seen."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


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
    scale = kwargs.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    mask = mask if mask is not None and mask.dim() == 4 else None
    how = (sink, float(scale), kwargs.get("softcap"), kwargs.get("sliding_window"))
    return _SinkMean.apply(query, key, weight, mask, *how)


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
        scores = _Scores(query, wide(key), groups, mask, scale, cap, window)
        stop = min(tokens, sink + window) if window else tokens
        total = wide(query.new_zeros(rows, heads))
        norms = wide(query.new_zeros(rows, heads, tokens))
        for part in scores.chunks(sink + 1, stop):
            s = scores(part)[0]
            norm = norms[:, :, part] = s.logsumexp(-1)
            first = scores.first(part)
            total += ((s[..., sink - first] - norm).exp() * weight[:, None, part]).sum(-1)
        ctx.save_for_backward(query, key, weight, norms, *([] if mask is None else [mask]))
        ctx.how = groups, stop, sink, scale, cap, window
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple:
        query, key, weight, norms, *mask = ctx.saved_tensors
        groups, stop, sink, scale, cap, window = ctx.how
        grad_query, grad_key = torch.zeros_like(query), torch.zeros_like(key)
        heads = upstream.ne(0).any(0).nonzero().squeeze(1)
        if len(heads) == 0:
            return (grad_query, grad_key, *[None] * 6)
        every = len(heads) == query.shape[1]
        q = query if every else query[:, heads]
        k = wide(key if every and groups == 1 else key[:, heads // groups])
        norms = norms if every else norms[:, heads]
        scores = _Scores(q, k, 1, mask[0] if mask else None, scale, cap, window)
        dk = torch.zeros_like(k).flatten(0, 1)
        for part in scores.chunks(sink + 1, stop):
            s, slope = scores(part)
            first = scores.first(part)
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


class _Scores:
    """Attention scores of a chunk of queries on all keys they may see, [rows, heads, queries, keys], fp32."""

    def __init__(
        self, query: torch.Tensor, key: torch.Tensor, groups: int, mask: torch.Tensor | None, scale: float,
        cap: float | None, window: int | None,
    ) -> None:  # fmt: skip
        self.query, self.key, self.groups, self.mask = query, key, groups, mask
        self.scale, self.cap, self.window = scale, cap, window

    def chunks(self, start: int, stop: int) -> Iterator[slice]:
        rows, heads, tokens, _ = self.query.shape
        elements = CHUNK_ELEMENTS.get(self.query.device.type, CHUNK_ELEMENTS["elsewhere"])
        size = max(MIN_CHUNK_ROWS, elements // (rows * heads * tokens))
        for first in range(start, stop, size):
            yield slice(first, min(first + size, stop))

    def first(self, part: slice) -> int:
        """The first key that any of these queries sees."""
        return max(0, part.start - self.window + 1) if self.window else 0

    def __call__(self, part: slice) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scores after scale, soft cap and mask, of keys `first(part)` to `part.stop`, and the cap's slope."""
        rows, heads, _, size = self.query.shape
        first = self.first(part)
        keys = self.key[:, :, first : part.stop]
        q = wide(self.query[:, :, part]) * self.scale
        s = q.reshape(rows, heads // self.groups, -1, size) @ keys.transpose(-1, -2)
        s = s.view(rows, heads, -1, part.stop - first)
        slope = None
        if self.cap:
            bounded = torch.tanh(s / self.cap)
            s, slope = bounded * self.cap, 1 - bounded.square()
        if self.mask is not None:
            mask = self.mask[:, :, part, first : part.stop]
            s = s.masked_fill_(~mask, float("-inf")) if mask.dtype == torch.bool else s + wide(mask)
        else:
            start = first if self.window else part.start  # without a window all queries see the keys before the chunk
            i = torch.arange(part.start, part.stop, device=s.device)[:, None]
            j = torch.arange(start, part.stop, device=s.device)
            hidden = (j > i) | (j <= i - self.window) if self.window else j > i
            s[..., start - first :].masked_fill_(hidden, float("-inf"))
        return s, slope
