"""Frozen linear layers in 4 or 8 bits, by bitsandbytes, below adapters that train in full precision.

- `nf4`: QLoRA's (Dettmers et al., arXiv 2305.14314): NormalFloat in blocks of 64 weights, the blocks' scales in 8 bits
  themselves; 4.13 bits a weight. Products are taken with the weights decoded.
- `int8`: LLM.int8() (Dettmers et al., arXiv 2208.07339): a scale for each output; 8 bits a weight. On an accelerator
  the inputs are rounded to 8 bits too, row by row, but for features that exceed 6 somewhere. On the CPU they are not.

Embeddings, norms and the head stay as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import bitsandbytes as bnb
import torch
from torch import nn

from tunevax.errors import UsageError
from tunevax.modeling.blocks import find_blocks
from tunevax.modeling.quantization import require_quantization

Packed = TypeVar("Packed", bound=nn.Linear)
OUTLIERS = 6.0  # what an input feature must exceed to stay out of int8: the paper's, and transformers'
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # a warning per bf16 product


def quantize(model: nn.Module, kind: str, device: str | torch.device | None = None) -> None:
    """Replace every linear layer in the decoder blocks by a frozen one of few bits, in place, one after the other, so
    the whole model is never in memory twice. PEFT then wraps the layers with its own for bitsandbytes.

    Args:
        model: a plain transformers model; on `meta` the packed tensors are too, with the sizes that they would have.
        device: where they are packed and stay, much faster on a GPU; default where they are. Move the rest after.

    Raises:
        UsageError: no such kind; the model has an adapter, or is quantised already; a block has matrices that are not
            in a linear layer (GPT-2's Conv1D, fused experts), which bitsandbytes leaves as they are.
    """
    require_quantization(kind)
    name = type(model).__name__
    if hasattr(model, "peft_config"):
        raise UsageError("the model comes with an adapter; merge it before the weights are quantised")
    if any(getattr(model, flag, False) for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized")):
        raise UsageError(f"this {name} is quantised already; leave --quantization out")
    blocks = [block.module for block in find_blocks(model)]
    for path, module in (named for block in blocks for named in block.named_modules()):
        own = [n for n, p in module.named_parameters(recurse=False) if p.dim() > 1]
        if own and not isinstance(module, nn.Linear):
            raise UsageError(
                f"the blocks of {name} hold weights outside of linear layers ({path}.{own[0]}, a "
                f"{type(module).__name__}), which bitsandbytes does not quantise; leave --quantization out"
            )
    # Its table for the scales is made once per process, where the first weights are: of `meta` it would be empty.
    bnb.functional.name2qmap.setdefault("dynamic", bnb.functional.create_dynamic_map())
    for block in blocks:
        for parent in [m for m in block.modules() if not isinstance(m, nn.Linear)]:
            for key in [n for n, child in parent.named_children() if isinstance(child, nn.Linear)]:
                linear = getattr(parent, key)
                weight = linear.weight.data.to(device or linear.weight.device)
                setattr(parent, key, (nf4 if kind == "nf4" else Int8Linear)(linear, weight))
    setattr(model, "is_loaded_in_4bit" if kind == "nf4" else "is_loaded_in_8bit", True)  # what PEFT goes by


def nf4(linear: nn.Linear, weight: torch.Tensor) -> bnb.nn.Linear4bit:
    """`linear` with `weight` in NF4, and its bias and hooks. It computes in the dtype that the weight had."""
    packed, state = bnb.functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    sizes = linear.in_features, linear.out_features
    made = bnb.nn.Linear4bit(*sizes, False, weight.dtype, quant_type="nf4", device="meta")
    made.weight = bnb.nn.Params4bit(packed, quant_state=state, quant_type="nf4", module=made, bnb_quantized=True)
    made.quant_state = state
    # Where the CPU has bf16 products, a forward in eval mode would repack the weight for a kernel without gradients,
    # for good: the passes that train after it would be cut off from the loss.
    made.support_avx512bf16_for_cpu = False
    return _like(made, linear)


class Int8Linear(bnb.nn.Linear8bitLt):
    """`linear` with `weight` in int8, and its bias and hooks. Other than the stock layer it keeps no input for the
    backward pass, rounds inputs in training and eval mode alike (on the CPU not at all), and moves with its scales."""

    weight: Any

    def __init__(self, linear: nn.Linear, weight: torch.Tensor) -> None:
        super().__init__(linear.in_features, linear.out_features, False, has_fp16_weights=False, device="meta")
        packed, scales, _ = bnb.functional.int8_vectorwise_quant(weight.half())
        self.weight = bnb.nn.Int8Params(packed, requires_grad=False, has_fp16_weights=False)
        self.state.CB, self.state.SCB = packed, scales
        # On `meta` nobody knows how many features are outliers.
        self.state.threshold = 0.0 if packed.is_meta else OUTLIERS
        _like(self, linear)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] to [..., out]."""
        if self.weight.CB is not None:  # a new weight: PEFT merged an adapter into it
            self.init_8bit_state()
        return Int8Product.apply(x, self)

    def _apply(self, fn: Callable, recurse: bool = True) -> Int8Linear:
        if self.weight.CB is not None:
            self.init_8bit_state()
        super()._apply(fn, recurse)
        self.weight.CB = self.weight.SCB = None
        self.state.CB, self.state.SCB = self.weight.data, fn(self.state.SCB).float()
        return self


class Int8Product(torch.autograd.Function):
    """bitsandbytes' product, with the gradient of its input: through the decoded weight, as if nothing was rounded."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Int8Linear) -> torch.Tensor:
        """[..., in] to [..., out]."""
        ctx.layer, ctx.dtype = layer, x.dtype
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return bnb.matmul(x, layer.weight, bias=bias, state=layer.state)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        """[..., out] to [..., in]."""
        state = ctx.layer.state
        weight = state.CB.to(ctx.dtype).mul_(state.SCB[:, None] / 127)
        return gradient.to(ctx.dtype) @ weight, None


def _like(made: Packed, linear: nn.Linear) -> Packed:
    made.bias, made._forward_hooks = linear.bias, linear._forward_hooks  # a lock's bias is a hook
    return made.train(linear.training)
