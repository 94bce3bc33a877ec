"""What trains: a fresh LoRA adapter, or all weights."""

from __future__ import annotations

import functools
import inspect
import re
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from tunevax.errors import UsageError
from tunevax.modeling.blocks import unwrap
from tunevax.modeling.precision import wide
from tunevax.modeling.quantization import scales_of, size_of

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from tunevax.modeling.trainer import TrainConfig
    from tunevax.records import ModelInfo


def prepare_trainables(model: PreTrainedModel, args: TrainConfig) -> PreTrainedModel:
    """Give `model` a fresh LoRA adapter (or all its weights) to train, in fp32.

    A model that comes with a trainable adapter keeps it. `all-linear` is every linear layer but the head, and the
    matrices of fused experts. Raises `UsageError` if one of `lora_targets` matches nothing.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    if args.full_weights:
        if scales_of(model):
            raise UsageError("full_weights trains all weights, and a quantised model's are frozen; train an adapter")
        for parameter in model.parameters():
            parameter.requires_grad_(True)
    elif isinstance(model, PeftModel):
        if model.active_peft_config.is_prompt_learning:  # its tokens in front shift all that is taken by position
            raise UsageError(
                f"the model comes with an adapter of kind {model.active_peft_config.peft_type.value}, which trains a "
                "prompt and no weights; give the model without it, or one with a LoRA adapter"
            )
    else:
        targets, experts = split_targets(model, args.lora_targets)
        if experts and args.lora_dropout:
            raise UsageError(
                f"PEFT has no dropout for the fused matrices of {type(model).__name__} ({', '.join(experts)}); leave "
                "out --lora-dropout, or name linear layers alone in --lora-targets"
            )
        leave_out = no_place_for_an_adapter(model) if targets == "all-linear" else []
        alpha = cast("int", args.lora_alpha)  # PEFT takes any number
        config = LoraConfig(
            r=args.lora_r, lora_alpha=alpha, lora_dropout=args.lora_dropout, target_modules=targets,
            exclude_modules=leave_out or None, target_parameters=experts or None, task_type="CAUSAL_LM",
        )  # fmt: skip
        with torch.random.fork_rng():  # the adapter's start depends on the seed only
            torch.manual_seed(args.seed)
            try:
                model = cast("PreTrainedModel", get_peft_model(model, config))
            except ValueError as error:
                raise UsageError(f"lora_targets {args.lora_targets!r}: {str(error).splitlines()[0]}") from error
        require_targets(model, args.lora_targets)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = wide(parameter.data)
    return model


def no_place_for_an_adapter(model: PreTrainedModel) -> list[str]:
    """Linear layers that `all-linear` leaves out, by path.

    - Linear by class alone: they do not return [..., out] for [..., in], as Llama 4's router, which returns a pair.
    - Never called, or not always: the module above uses the weight itself, as Mamba does with `dt_proj` and, in its
      fused kernels, with `x_proj` and `out_proj`. An adapter on the layer would have no effect there.
    """
    left_out = []
    for path, module in model.named_modules():
        if children := [name for name, child in module.named_children() if isinstance(child, torch.nn.Linear)]:
            kind: Any = type(module)
            left_out += [f"{path}.{name}" for name in children if name in weights_taken(kind)]
        if isinstance(module, torch.nn.Linear) and type(module).forward is not torch.nn.Linear.forward:
            weight = module.weight
            if weight.is_floating_point() and weight.shape == (module.out_features, module.in_features):
                try:
                    with torch.no_grad():
                        output = module(weight.new_zeros(1, module.in_features))
                except RuntimeError:  # DeepSeek V4's grouped layer takes rows of another shape
                    output = None
                if not torch.is_tensor(output) or output.shape != (1, module.out_features):
                    left_out.append(path)
    return left_out


@functools.cache
def weights_taken(kind: type[nn.Module]) -> list[str]:
    """The layers of a module whose whole weight its own code uses, for more than the dtype or the device."""
    try:
        return re.findall(r"\bself\.(\w+)\.weight\b(?!\.(?:dtype|device|shape|size)|\[)", inspect.getsource(kind))
    except (OSError, TypeError):  # there is no source
        return []


def expert_matrices(model: nn.Module) -> list[str]:
    """The matrices of experts and routers that are parameters of their own and in no linear layer, by their path in the
    block: `mlp.experts.gate_up_proj`. PEFT's `all-linear` takes them for some architectures and not for others."""
    paths = {
        re.split(r"\.\d+\.", f"{path}.{name}")[-1]
        for path, module in model.named_modules()
        if re.search("Expert|Router|TopKGat", type(module).__name__) and not isinstance(module, nn.Linear)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() in (2, 3) and not name.endswith("bias")  # the kinds that PEFT adapts
    }
    return sorted(paths)


def split_targets(model: nn.Module, names: str) -> tuple[str | list[str], list[str]]:
    """What `--lora-targets` names, as PEFT's target_modules and target_parameters."""
    experts = expert_matrices(model)
    if names == "all-linear":
        return names, experts
    given = [name.strip() for name in names.split(",") if name.strip()]
    modules = [path for path, _ in model.named_modules()]
    parameters = {
        name: [path for path in experts if f".{path}".endswith(f".{name}")]
        for name in given
        if not any(f".{path}".endswith(f".{name}") for path in modules)
    }
    return [name for name in given if not parameters.get(name)], sorted({p for ps in parameters.values() for p in ps})


def require_targets(model: PreTrainedModel | PeftModel, names: str) -> None:
    """Raise `UsageError` if one of the comma-separated names matched nothing in `model`, a `PeftModel`: PEFT
    objects only if none does. (It renames those of experts that it has fused.)"""
    configs: Any = model.peft_config
    targets = getattr(configs["default"], "target_modules", "")
    paths = [path for path, _ in model.named_modules() if path.endswith((".lora_A", ".lora_embedding_A"))]
    for name in sorted(targets) if names != "all-linear" and not isinstance(targets, str) else ():
        if not any(path.rpartition(".")[0].endswith(f".{name}") for path in paths):
            raise UsageError(f"lora_targets {names!r}: no layer of the model that can have an adapter is called {name}")


def coverage(model: nn.Module) -> ModelInfo:
    """The matrices of a `PeftModel` with an adapter (`adapted`) and without (`left_out`), each from the path, with `*`
    for numbers, to the number of weights. Norms, biases and other vectors are in neither."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    covered: ModelInfo = {"adapted": {}, "left_out": {}}
    stock, adapted, inside = unwrap(model), set(), set()
    for module in stock.modules():
        if isinstance(module, BaseTunerLayer):
            layer: Any = module
            base = layer.get_base_layer()
            adapted.add(id(getattr(base, getattr(layer, "parameter_name", "weight"), None)))
            own = {id(p) for p in base.parameters()}
            inside |= {id(p) for p in layer.parameters()} - own
        elif isinstance(module, AuxiliaryTrainingWrapper):
            adapted |= {id(p) for p in module.original_module.parameters()}
            inside |= {id(p) for p in module.parameters()} - adapted
    for path, parameter in stock.named_parameters():
        matrix = parameter.dim() > 1 or getattr(parameter, "quant_state", None) is not None
        if id(parameter) in inside or path.endswith("bias") or not matrix:
            continue
        name = re.sub(r"\.(base_layer|original_module)(?=\.)", "", path)
        name = re.sub(r"(?<=\.)\d+(?=\.)", "*", name).removesuffix(".weight")
        kind = covered["adapted"] if id(parameter) in adapted else covered["left_out"]
        kind[name] = kind.get(name, 0) + size_of(parameter)
    return covered


def left_out_of_blocks(covered: ModelInfo) -> str | None:
    """A sentence on the matrices in the blocks that a `coverage` leaves out; None if under 1 % of the weights there."""
    sizes = {name: size for name, size in covered["left_out"].items() if ".*." in name}
    total = sum(sizes.values()) + sum(size for name, size in covered["adapted"].items() if ".*." in name)
    share = sum(sizes.values()) / max(total, 1)
    if share < 0.01:
        return None
    return f"no adapter on {', '.join(sizes)}: {share:.0%} of the weights in the blocks stay as they are"
