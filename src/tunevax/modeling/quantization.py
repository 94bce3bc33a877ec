"""Models whose frozen weights are quantised: which kinds there are, and what their parameters hold. See `packing`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tunevax.errors import UsageError, unknown

if TYPE_CHECKING:
    from transformers import PreTrainedModel

QUANTIZATIONS = ("nf4", "int8")
"""What the linear layers in the blocks can be packed into: see `tunevax.modeling.packing`."""


def saved_quantization(model: nn.Module) -> str | None:
    """The kind of quantisation that a model was saved in, such as bitsandbytes, if it is still in it."""
    if not getattr(model, "is_quantized", False):
        return None
    method = getattr(model, "quantization_method", None)
    return str(getattr(method, "value", method or "an unknown kind"))


def dequantize(model: PreTrainedModel, base: str) -> None:
    """Give `model` weights in its dtype instead of quantised ones, in place: a merge would round those again."""
    kind = saved_quantization(model)
    try:
        model.dequantize(dtype=model.dtype)
    except Exception as error:
        raise UsageError(
            f"the weights of {base} are saved in {kind}, in which an adapter cannot be merged without rounding them "
            "again; let the adapter name the base in full precision"
        ) from error
    for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized"):
        setattr(model, flag, False)


def require_quantization(kind: str | None, full_weights: bool = False) -> None:
    """Raise `UsageError` if `kind` is unknown, unavailable here, or of weights that are to train."""
    if kind is None:
        return
    if kind not in QUANTIZATIONS:
        raise unknown("quantization", kind, QUANTIZATIONS)
    if full_weights:
        raise UsageError(
            f"full_weights trains all weights, and those of an {kind} base are frozen; leave out --full-weights or "
            "--quantization"
        )
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise UsageError("--quantization needs bitsandbytes; pip install 'tunevax[quant]'") from error


def size_of(parameter: torch.Tensor) -> int:
    """The number of weights that a parameter holds: of 4-bit ones, which share bytes, more than it has elements."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def scales_of(model: nn.Module) -> list[Any]:
    """The tensors that quantised layers hold beside their parameters and buffers."""
    scales = []
    for module in model.modules():
        packed: Any = getattr(module, "quant_state", None)
        state: Any = getattr(module, "state", None)
        if packed is not None:  # 4 bits: scales, and the scales of scales
            scales += [packed.absmax, packed.code, packed.offset, packed.state2.absmax, packed.state2.code]
        elif getattr(state, "SCB", None) is not None:  # 8 bits
            scales.append(state.SCB)
    return scales
