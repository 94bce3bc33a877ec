"""Reading plain LoRA: the layers of a model that have an adapter, its factors, and the weights below."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import torch

from tunevax.errors import UsageError
from tunevax.modeling.blocks import innermost, unwrap

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import Linear
    from transformers import PreTrainedModel


def lora_layers(model: PreTrainedModel | PeftModel, ref: str) -> dict[str, Linear]:
    """The linear layers of `model` with an adapter, by their name in the model without adapters. Raises `UsageError` if
    there is no adapter, or one that is more than B A on linear layers."""
    from peft import PeftModel
    from peft.tuners import lora

    if not isinstance(model, PeftModel):
        raise UsageError(f"{ref} has no adapter of its own to work on; give a run that was fine-tuned with one")
    layers: dict[str, Linear] = {}
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, lora.LoraLayer):
            adapter = layer.active_adapters[0]
            plain = isinstance(layer, lora.Linear) and type(layer) is lora.Linear
            if not plain or adapter in layer.lora_variant or layer.lora_bias[adapter]:
                raise UsageError(f"{ref}: the adapter of {name} is not plain LoRA on a linear layer, which this needs")
            layers[name] = cast("Linear", layer)
    if not layers:
        raise UsageError(f"{ref}: its adapter is no LoRA, which this needs")
    return layers


def active(layer: Linear) -> str:
    """The name of the adapter on a layer of a freshly loaded `PeftModel`."""
    return layer.active_adapters[0]


def factors(layer: Linear) -> tuple[torch.Tensor, torch.Tensor]:
    """A [r, in] and B [out, r] of a layer's adapter."""
    a, b = (side[active(layer)].weight for side in (layer.lora_A, layer.lora_B))
    return cast("torch.Tensor", a), cast("torch.Tensor", b)


def weights(model: PreTrainedModel | PeftModel, layers: Mapping[str, Linear], ref: str) -> dict[str, torch.Tensor]:
    """The weights [out, in] of `model` under the names of adapted layers, those below the adapters if it has them.
    Raises `UsageError` if `model` has no such layer."""
    stock = unwrap(model)
    result = {}
    for name, layer in layers.items():
        try:
            module = stock.get_submodule(name)
        except AttributeError as error:
            raise UsageError(f"{ref} has no layer {name}, so the fine-tune is none of it") from error
        weight = innermost(module).weight.detach()
        result[name] = weight.T if layer.fan_in_fan_out else weight
    return result
