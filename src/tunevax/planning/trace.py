"""Run a method's own step on tensors without content, and count what it holds and computes.

Weights and what is computed from them are on torch's `meta` device, where an operation only works out the shape of its
result. Token ids, labels and masks are real: code looks up where the labels are. Nothing is estimated: the step is the
trainer's, block by block, and memory is counted as `LiveMemory` does on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from transformers import masking_utils

from tunevax.modeling.blocks import find_blocks
from tunevax.modeling.hooks import attached, tensor_of
from tunevax.modeling.memory import LiveMemory

aten = torch.ops.aten
REAL_AT_MOST = 2**16  # elements of a new tensor that is made for real: ids and masks are, noise is not
PACKED = ("bitsandbytes::gemm_4bit", "bitsandbytes::int8_scaled_mm")  # products with weights of few bits
FLOPS = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
        q.shape, _repeated(k, q), _repeated(v, q)
    ),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(
        g.shape, q.shape, _repeated(k, q), _repeated(v, q)
    ),
}


def _repeated(key: torch.Tensor, query: torch.Tensor) -> tuple[int, ...]:
    """The shape of keys or values as if each query head had its own."""
    return (key.shape[0], query.shape[1], *key.shape[2:])


class Trace(LiveMemory):
    """Counts memory by kind, and floating-point operations, of code that runs on `meta` tensors. What is made while a
    graph is recorded is `activations`, what has the vocabulary for its last dimension `logits`, all else `workspace`
    (gradients on their way, temporary tensors, recorded inputs of frozen blocks); who makes the rest marks it."""

    counts_meta = True

    def __init__(self, vocabulary: int, device: str = "cuda") -> None:
        super().__init__()
        self.vocabulary, self.device = vocabulary, device
        self.flops = 0  # floating-point operations, recomputation included; a multiply-add is two
        self.passes = [0, 0]  # tokens that went through one block forward and backward, summed over blocks
        self.making: str | None = None  # the kind of what is made from here on, or None for the rule above
        self.known: dict[tuple, tuple | None] = {}  # None: a view of an argument, or not a tensor

    @property
    def made(self) -> str:  # type: ignore[override]
        """The kind of a tensor made just now."""
        return self.making or ("activations" if torch.is_grad_enabled() else "workspace")

    def __torch_dispatch__(self, func: OpOverload, types: object, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        items = (t for a in (*args, *kwargs.values()) for t in (a if isinstance(a, list | tuple) else (a,)))
        tensors = [t for t in items if isinstance(t, torch.Tensor)]
        meta = sum(t.is_meta for t in tensors)
        # The shape that a function without tensors is called with, if it is one that makes a tensor.
        size = args[0] if args and isinstance(args[0], list | tuple) else [1]
        size = size if all(isinstance(n, int) for n in size) else [1]
        if not tensors and math.prod(size) > REAL_AT_MOST and "device" in kwargs:
            args = tuple(a for a in args if not isinstance(a, torch.Generator))
            kwargs = {**kwargs, "device": torch.device("meta")}
            kwargs.pop("generator", None)
            func = aten.empty.memory_format if "generator" in str(func._schema) else func
        if meta:
            if func is aten._local_scalar_dense.default:
                return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
            if func is aten._to_copy.default and kwargs.get("device") is not None:
                kwargs = {**kwargs, "device": torch.device("meta")}
                if kwargs.get("dtype") in (None, args[0].dtype):  # to where it is already, or away from here
                    return func(*args, **kwargs)
            if meta < len(tensors):
                written = args[0] if func._schema.name.endswith("_") and not args[0].is_meta else None
                args, kwargs = moved(func, args, kwargs)
                if written is not None:  # a real tensor keeps its content: what would be written has none
                    func(*args, **kwargs)
                    return written
        result, flops = self.compute(func, args, kwargs)
        for leaf in result if isinstance(result, tuple | list) else (result,):
            if isinstance(leaf, torch.Tensor):
                self.track(leaf, kind="logits" if leaf.dim() > 1 and leaf.shape[-1] == self.vocabulary else None)
        if func._schema.name in PACKED:  # inside, the weight is decoded, or the product is in int32 first
            inner = args[1].numel() * 2 * args[0].element_size() if "4bit" in func._schema.name else 4 * result.numel()
            self.track(torch.empty(inner, dtype=torch.uint8, device="meta"), kind="workspace")
        self.flops += flops
        return result

    def compute(self, func: OpOverload, args: tuple, kwargs: dict) -> tuple[Any, int]:
        """The result of an operation, and its floating-point operations. The blocks of a model are alike: what an
        operation makes of such shapes is worked out once, unless it writes to or shares memory with an argument."""
        key = _key(func, args, kwargs)
        if key is not None and (known := self.known.get(key)):
            shapes, several, flops = known
            made = [torch.empty_strided(size, stride, dtype=dtype, device="meta") for size, stride, dtype in shapes]
            return (tuple(made) if several else made[0]), flops
        result = func(*args, **kwargs)
        count = FLOPS.get(func._overloadpacket)
        flops = count(*args, **kwargs, out_val=result) if count is not None else 0
        if func._schema.name in PACKED:
            flops = 2 * args[0].numel() * result.shape[-1]
        if key is not None and key not in self.known:
            several = isinstance(result, tuple | list)
            results = tuple(result) if several else (result,)
            new = all(isinstance(r, torch.Tensor) and r.is_meta for r in results)
            if new:
                storages = {r.untyped_storage()._cdata for r in results}
                given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
                new = len(storages) == len(results) and not storages & given
            self.known[key] = ([(r.shape, r.stride(), r.dtype) for r in results], several, flops) if new else None
        return result, flops

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Count the tokens that go through the blocks of `model`, and mark the gradients of its weights."""

        def went(way: int, tensor: torch.Tensor) -> None:
            self.passes[way] += tensor.numel() // tensor.shape[-1]

        def left(_module: nn.Module, _args: tuple, output: torch.Tensor | tuple) -> None:
            if tensor_of(output).requires_grad:
                tensor_of(output).register_hook(lambda gradient: went(1, gradient))

        mlps = [block.mlp or block.module for block in find_blocks(model)]
        # As they are entered: a recomputation may stop before the end of the MLP.
        handles = [mlp.register_forward_pre_hook(lambda _module, args: went(0, args[0])) for mlp in mlps]
        handles += [mlp.register_forward_hook(left) for mlp in mlps]
        trained = [p for p in model.parameters() if p.requires_grad]
        handles += [p.register_post_accumulate_grad_hook(lambda p: self.mark("gradients", p.grad)) for p in trained]
        # `meta` would answer that a mask is all ones. On an accelerator it rarely is: rows differ in length.
        stock, autocast = masking_utils._ignore_causal_mask_sdpa, torch.autocast
        # PEFT leaves autocast where it adds an adapter to experts, by device, and `meta` is none.
        torch.autocast = lambda kind, **k: nullcontext() if kind == "meta" else autocast(kind, **k)  # type: ignore[misc,assignment]
        if self.device != "cpu":
            masking_utils._ignore_causal_mask_sdpa = lambda *_, **__: False
        with attention_for(self.device), attached(handles):
            try:
                yield
            finally:
                masking_utils._ignore_causal_mask_sdpa = stock
                torch.autocast = autocast  # type: ignore[misc]


def _key(func: OpOverload, args: tuple, kwargs: dict) -> tuple | None:
    """What a result's shape depends on; None if it depends on values, or the operation writes to an argument."""
    if func._schema.is_mutable:
        return None
    parts: list[Any] = [func]
    for value in (*args, *kwargs.items()):
        for item in value if isinstance(value, list | tuple) else (value,):
            if isinstance(item, torch.Tensor):
                if not item.is_meta:
                    return None
                parts.append((item.shape, item.stride(), item.dtype))
            else:
                parts.append(tuple(item) if isinstance(item, list) else item)
        parts.append(None)
    try:
        hash(key := tuple(parts))
    except TypeError:
        return None
    return key


def moved(func: OpOverload, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The arguments on `meta`. A real mask that selects elements becomes their indices, whose number is known."""
    if func._overloadpacket in (aten.index, aten.index_put, aten.index_put_):
        indices: list[torch.Tensor | None] = []
        for index in args[1]:
            mask = index is not None and index.dtype == torch.bool
            indices += index.nonzero().unbind(1) if mask else [index]
        args = (args[0], indices, *args[2:])
    elif func is aten.masked_select.default:
        raise NotImplementedError("masked_select of weights cannot be planned; index with the mask instead")
    return tree_map_only(torch.Tensor, lambda t: t if t.is_meta else t.to("meta"), (args, kwargs))


@contextmanager
def attention_for(device: str) -> Iterator[None]:
    """The kernel that `scaled_dot_product_attention` would choose on `device`, instead of the one it has for `meta`."""
    stock = nn.functional.scaled_dot_product_attention

    def chosen(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        if not query.is_meta:
            return stock(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if device == "cpu":
            with _disable_current_modes():  # the question needs shapes on the CPU; the memory is not touched
                q, k, v = (torch.empty_strided(t.shape, t.stride(), dtype=t.dtype) for t in (query, key, value))
                mask = attn_mask
                if mask is not None:
                    mask = torch.empty_strided(mask.shape, mask.stride(), dtype=mask.dtype)
                fused = torch._fused_sdp_choice(q, k, v, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
            if not fused:
                return aten._scaled_dot_product_attention_math(
                    query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
                )[0]
            return aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, dropout_p, is_causal, attn_mask=additive(attn_mask, query), scale=scale
            )[0]
        if attn_mask is None and query.dtype != torch.float32:
            return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
        repeats = query.shape[1] // key.shape[1]
        if enable_gqa and repeats > 1:
            key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        mask = additive(attn_mask, query)
        if mask is not None:
            mask = mask.expand(*query.shape[:3], key.shape[2])
        needs_graph = torch.is_grad_enabled() and query.requires_grad
        return aten._scaled_dot_product_efficient_attention(
            query, key, value, mask, needs_graph, dropout_p, is_causal, scale=scale
        )[0]

    nn.functional.scaled_dot_product_attention = chosen
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = stock


def additive(mask: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor | None:
    """A boolean mask as what is added to the scores, as every fused kernel wants it."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill_(mask.logical_not(), -math.inf)
