"""Adapters on a model: loading one with PEFT's report, merging one and checking it, and the factors of plain LoRA.

PEFT and transformers only warn where weights are missing, left over or rounded away. Here each is an error.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import nn

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import Linear
    from transformers import PreTrainedModel

from tunevax.errors import UsageError, out_of_memory, shortened
from tunevax.files import damage
from tunevax.modeling.blocks import embedding, innermost, plain_tokens, unwrap
from tunevax.modeling.precision import wide

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
"""What PEFT calls the file of an adapter's weights."""
NARROW = (torch.bfloat16, torch.float16)
KEPT = 0.9
"""The share of an adapter's update that a merge has to keep; rounding takes the rest."""
OFF = 0.1
"""How far the logits of a merged model may be from those of the unmerged one, in units of what the adapter moves, and
on top of the rounding of activations."""
FARTHEST = 1.5
"""The limit in any case: if an adapter moves the logits no more than rounding does, two evaluations are 1 apart, and
with the rounding of the weights 1.4."""
ALONG = 0.8
"""The share of what an adapter does to the logits that has to be left after a merge; see `arrived`. Of 144 sound merges
in bf16 (2 to 32 blocks, moves of 0.3 % to 35 % of the logits) the least had 0.89."""


class RoundedAway(UsageError):
    """An adapter has no effect, or loses too much of it, in the model's dtype; in float32 it may have one."""


class Merge(NamedTuple):
    """What a merge did to the model."""

    dtype: str  # of the weights
    kept: float  # share of the update dW that is in them after rounding, <W' - W, dW> / <dW, dW>; 1 in float32
    off: float  # distance of the merged from the unmerged logits on the probe, over what the adapter moves them
    along: float  # how far it moves them in the adapter's direction, over how far the adapter does: about 1; 0, nothing


def load_adapter(model: PreTrainedModel, folder: Path, trainable: bool = False) -> PeftModel:
    """`model` under the adapter in `folder`, as a `PeftModel`. Raises `UsageError` if the folder has no whole adapter,
    if its weights do not fit the model, or if it adds to the prompt instead of weights and cannot be merged."""
    from peft import PeftConfig, PeftModelForCausalLM

    file = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise UsageError(
            f"{folder} has an adapter_config.json and no weights ({' or '.join(WEIGHTS)}); if it is a merged model, "
            "delete that file"
        )
    if why := damage(folder / "adapter_config.json") or damage(file):
        raise UsageError(why)
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # no JSON, an unknown kind, options of a newer PEFT
        raise UsageError(f"{folder / 'adapter_config.json'} cannot be read: {shortened(error)}") from error
    if config.is_prompt_learning:
        raise UsageError(
            f"{folder} is an adapter of kind {config.peft_type.value}, which adds to the prompt and not to weights; "
            "tunevax loads adapters that can be merged, such as LoRA"
        )
    config.inference_mode = not trainable
    try:
        fit_embeddings(model, folder)
        made = PeftModelForCausalLM(model, config)
        report = made.load_adapter(
            str(folder), "default", is_trainable=trainable, torch_device="cpu",
            key_mapping=getattr(model, "_checkpoint_conversion_mapping", {}),
        )  # fmt: skip
    except UsageError:
        raise
    except KeyError as error:  # a whole module that the adapter says it holds
        raise UsageError(f"the adapter {folder} lacks {error}, which its adapter_config.json names") from error
    except Exception as error:  # sizes that differ, modules that are not there
        if out_of_memory(error):
            raise
        raise UsageError(
            f"the adapter {folder} does not fit {type(model).__name__}: {shortened(error)}; is it of another base?"
        ) from error
    shared = ("vblora_vector_bank", ".tinylora_v.")  # PEFT's own exceptions
    missing = [key for key in report.missing_keys if not any(name in key for name in shared)]
    # Of a module that it trained whole and whose vocabulary grew PEFT saves every copy; the one it reads is no option.
    extra = [k for k in report.unexpected_keys if not re.search(r"\.(modules_to_save|original_module)\.\w+$", k)]
    if missing or extra:
        kinds = ((missing, "of its weights are missing"), (extra, "belong nowhere"))
        parts = [f"{len(keys)} {what}, such as {sorted(keys)[0]}" for keys, what in kinds if keys]
        raise UsageError(
            f"the adapter {folder} does not fit {type(model).__name__}: {' and '.join(parts)}; save it with PEFT's "
            "save_pretrained, and give the base that it was trained on"
        )
    return made


def fit_embeddings(model: PreTrainedModel, folder: Path) -> None:
    """Resize the embeddings of `model` to those of the adapter in `folder`, and compare the base's weights that PEFT
    saved below a LoRA adapter: a difference means another base."""
    from peft import load_peft_weights

    saved = load_peft_weights(str(folder), "cpu")
    names = {"input": model.get_input_embeddings(), "output": model.get_output_embeddings()}
    paths = {which: path for path, module in model.named_modules() for which, m in names.items() if m is module}
    held = {}
    for which, path in paths.items():
        for key in (f"base_model.model.{path}.base_layer.weight", f"base_model.model.{path}.weight"):
            if key in saved:
                held[which] = saved[key]
                own = names[which].weight
                if ".base_layer." in key and own.shape == saved[key].shape:
                    narrow = min(own.dtype, saved[key].dtype, key=lambda dtype: dtype.itemsize)
                    if not torch.equal(own.to("cpu", narrow), saved[key].to(narrow)):
                        raise UsageError(f"{folder} is an adapter of another base: {path} differs in its weights")
    rows = {len(weight) for weight in held.values()}
    if len(rows) != 1 or rows == {len(embedding(model))}:
        return
    tied = names["output"] is None or names["output"].weight is names["input"].weight
    if len(held) < 2 and not tied:
        raise UsageError(
            f"the adapter {folder} is for a vocabulary of {rows.pop()}, and of {' and '.join(held)} embeddings holds "
            "the weights alone; save it with save_embedding_layers=True"
        )
    model.resize_token_embeddings(rows.pop(), mean_resizing=False)


@torch.no_grad()
def merge(model: PeftModel, ref: str) -> tuple[PreTrainedModel, Merge]:
    """The stock model with the adapter of `model` in its weights, and how well it got there.

    `model` is not quantised; its head and embedding no longer share their weights if the adapter is on one of them.

    Raises:
        UsageError: the adapter changes nothing, or is of a kind that PEFT cannot merge, or the merged model is another.
        RoundedAway: the dtype is too narrow for the update.
    """
    apart, move = effect(model, ref)
    moved = float(move.norm())
    untie(model)
    stock = unwrap(model)
    dtype: torch.dtype = stock.dtype
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that all is merged already, and of ties: what matters is compared below
        try:
            kept = merge_layers(model)
            merged: PreTrainedModel = model.merge_and_unload()
        except Exception as error:
            if out_of_memory(error):
                raise
            raise UsageError(f"the adapter {ref} cannot be merged into {type(stock).__name__}: {error}") from error
    for module in {merged.get_input_embeddings(), merged.get_output_embeddings()} - {None}:
        if module.weight.is_floating_point():
            module.to(dtype)  # one that was trained whole comes in fp32
    gap = logits(merged) - apart
    off = float(gap.norm()) / moved
    along = round(1 + float((gap * move).sum()) / moved**2, 4) + 0.0  # not -0
    # Of activations: a block rounds a dozen tensors one after the other, each by 0.29 eps (the std of a uniform error):
    # eps for a block, in two evaluations independently, and twice that for what later blocks make of it.
    rounding = 2 * torch.finfo(dtype).eps * math.sqrt(2 * merged.config.get_text_config().num_hidden_layers)
    noise = rounding * float(apart.norm()) / moved
    if kept < KEPT or not off <= min(OFF + noise, FARTHEST) or not arrived(off, along):
        kind = str(dtype).removeprefix("torch.")
        why = (
            f"merging {ref} into {kind} weights keeps {kept:.0%} of its update and {along:.0%} of its effect on the "
            f"logits, and moves these {off:.0%} of its effect away from those of the unmerged model"
        )
        if dtype in NARROW:
            raise RoundedAway(why)
        raise UsageError(f"{why}; this kind of adapter cannot be merged into {type(merged).__name__}")
    return merged, Merge(str(dtype).removeprefix("torch."), round(kept, 4), float(f"{off:.2g}"), along)


def arrived(off: float, along: float) -> bool:
    """Whether merged logits are as far along the adapter's move as two evaluations of one function can be.

    Rounding of activations puts an error of length n into each of the logits: without the adapter, with it, and merged.
    The first is in both moves. If the adapter moves them by m, a merge that is right has along = (m^2 + n^2) /
    (m^2 + 2 n^2), which is 1 - off^2 / 2 whatever n is: 1 where m is large, 1/2 where there is nothing but rounding.
    One that puts nothing in has 0. Half of the update has 1/2 at less distance, and is noticed if m > n; twice the
    update is if m > 1.5 n. A wrong merge may be farther off than 1, so that off counts for at most that.
    """
    return ALONG * (1 - min(off, 1.0) ** 2 / 2) <= along <= 1 / ALONG


def effect(model: PeftModel, ref: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits of a `PeftModel` on the probe, and what its adapter adds; a `UsageError` if nothing or not finite."""
    model.eval()
    with model.disable_adapter():
        without = logits(model)
    apart = logits(model)
    move = apart - without
    moved = float(move.norm())
    if not math.isfinite(float(without.norm())):
        raise UsageError(f"the model below the adapter {ref} gives logits that are not finite; its weights are damaged")
    if not math.isfinite(moved):
        raise UsageError(f"under the adapter {ref} the logits are not finite; its weights are damaged")
    if moved:
        return apart, move
    why = "its update is 0, or too small for the model's weights"
    second = [p for n, p in model.named_parameters() if re.search(r"lora_(embedding_)?B\b", n)]
    if second and not any(p.any() for p in second):
        why = "its B matrices are all 0, so it was never trained (no step, or a learning rate of 0)"
    elif model.dtype in NARROW:
        kind = str(model.dtype).removeprefix("torch.")
        raise RoundedAway(f"the adapter {ref} moves no logit in {kind}: its update is too small for that")
    raise UsageError(f"the adapter {ref} moves no logit: {why}; use the model below it")


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    """On two fixed sequences of 16 tokens from all over the vocabulary, [2, 16, vocabulary] in fp32 or float64."""
    stock = unwrap(model)
    plain = plain_tokens(stock)
    chosen = [plain[i * len(plain) // 32] for i in range(32)]
    device = next(stock.get_input_embeddings().parameters()).device
    ids = torch.tensor(chosen, device=device).view(16, 2).T
    return wide(model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits)


def untie(model: PeftModel) -> None:
    """Give the head of a `PeftModel` weights of its own if it shares the embedding's and one of them has an adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    stock = unwrap(model)
    ends = [stock.get_input_embeddings(), stock.get_output_embeddings()]
    if not any(isinstance(module, BaseTunerLayer) for module in ends) or ends[1] is None:
        return
    own: list[Any] = [module.get_base_layer() if isinstance(module, BaseTunerLayer) else module for module in ends]
    if own[0].weight is own[1].weight:
        own[1].weight = nn.Parameter(own[1].weight.detach().clone(), requires_grad=False)
        record_ties(stock)


def record_ties(model: PreTrainedModel) -> None:
    """Let the config of a stock model say that head and embedding are not tied, if they are not."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    weights = [getattr(getattr(m, "base_layer", m), "weight", None) for m in (head, embedding)]
    if head is None or weights[0] is weights[1]:
        return
    for config in (model.config, model.config.get_text_config()):
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
    ties = getattr(model, "all_tied_weights_keys", {})
    own = dict(model.named_parameters(remove_duplicate=False))  # PEFT's wrappers hide a name
    model.all_tied_weights_keys = {k: v for k, v in ties.items() if k in own and own.get(v) is own[k]}


def merge_layers(model: nn.Module) -> float:
    """Add the adapter of each layer to its weight, in fp32 and rounded once. Returns the share of the update kept."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    kept = total = 0.0
    for layer in [m for m in model.modules() if isinstance(m, BaseTunerLayer) and hasattr(m, "merge")]:
        base = layer.get_base_layer()
        parameter = getattr(base, getattr(layer, "parameter_name", "weight"), None)
        if not isinstance(parameter, nn.Parameter) or parameter.dtype not in NARROW:
            continue  # merged by merge_and_unload, without loss
        before = parameter.data
        parameter.data = before.float()
        layer.merge()
        exact, parameter.data = parameter.data, parameter.data.to(before.dtype)
        update = exact - before.float()
        kept += float(((parameter.data.float() - before.float()) * update).sum(dtype=torch.float64))
        total += float(update.square().sum(dtype=torch.float64))
    return kept / total if total else 1.0


def lora_layers(model: PreTrainedModel | PeftModel, ref: str) -> dict[str, Linear]:
    """The linear layers of `model` with an adapter, by their name in the model without adapters. Raises `UsageError` if
    there is no adapter, or one that is more than B A on linear layers."""
    from peft import PeftModel
    from peft.tuners import lora

    if not isinstance(model, PeftModel):
        raise UsageError(f"{ref} has no adapter of its own to work on; give a run that was fine-tuned with one")
    layers = {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, lora.LoraLayer)}
    for name, layer in layers.items():
        if type(layer) is not lora.Linear or active(layer) in layer.lora_variant or layer.lora_bias[active(layer)]:
            raise UsageError(f"{ref}: the adapter of {name} is not plain LoRA on a linear layer, which this needs")
    if not layers:
        raise UsageError(f"{ref}: its adapter is no LoRA, which this needs")
    return cast("dict[str, Linear]", layers)


def active(layer: Linear) -> str:
    """The name of the adapter on a layer of a freshly loaded `PeftModel`."""
    return layer.active_adapters[0]


def factors(layer: Linear) -> tuple[torch.Tensor, torch.Tensor]:
    """A [r, in] and B [out, r] of a layer's adapter."""
    a, b = (side[active(layer)].weight for side in (layer.lora_A, layer.lora_B))
    return cast("torch.Tensor", a), cast("torch.Tensor", b)


def weights(model: PreTrainedModel | PeftModel, layers: Mapping[str, Linear], ref: str) -> dict[str, torch.Tensor]:
    """The weights [out, in] of `model`, below any adapter, of adapted layers; a `UsageError` where it has no such."""
    stock, result = unwrap(model), {}
    for name, layer in layers.items():
        try:
            weight = innermost(stock.get_submodule(name)).weight.detach()
        except AttributeError as error:
            raise UsageError(f"{ref} has no layer {name}, so the fine-tune is none of it") from error
        result[name] = weight.T if layer.fan_in_fan_out else weight
    return result
