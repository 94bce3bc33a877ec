"""Finding the decoder blocks, their attention, MLP and output projection in a stock transformers model."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from tunevax.errors import UsageError

ATTENTION_NAMES = ("self_attn", "attention", "attn", "self_attention")
# OPT has no MLP module: the output of its second linear is the MLP's output.
MLP_NAMES = ("mlp", "feed_forward", "ffn", "fc2")
OUTPUT_PROJECTION_NAMES = ("o_proj", "out_proj", "dense", "c_proj", "wo")


class Block(NamedTuple):
    """One decoder block. Every field is the live module, so hooks on it act on the model.

    Attributes:
        module: the whole block, hidden states in, hidden states out.
        attention: its attention module; its output (or the first element of it) is `e_l` of the papers,
            shape [batch, tokens, hidden], before the residual add.
        mlp: the module whose output is the MLP's output.
        o_proj: the attention's output projection (possibly wrapped by a LoRA layer).
    """

    module: nn.Module
    attention: nn.Module
    mlp: nn.Module
    o_proj: nn.Module


def find_blocks(model: nn.Module) -> list[Block]:
    """The decoder blocks of `model` (plain, PEFT-wrapped or DDP-wrapped), lowest first.

    Raises:
        UsageError: no list of `num_hidden_layers` equal blocks with attention and MLP is found; the message
            names the class and what was looked for.
    """
    class_name = type(unwrap(model)).__name__
    depth = getattr(unwrap(model).config.get_text_config(), "num_hidden_layers", None)
    lists = [
        m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth and _child(m[0], ATTENTION_NAMES)
    ]
    if not lists:
        raise UsageError(
            f"no decoder blocks found in {class_name}: looked for a ModuleList of {depth} blocks, each with one of "
            f"{', '.join(ATTENTION_NAMES)}"
        )
    blocks = []
    for i, module in enumerate(lists[0]):
        attention, mlp = _child(module, ATTENTION_NAMES), _child(module, MLP_NAMES)
        o_proj = _child(attention, OUTPUT_PROJECTION_NAMES) if attention is not None else None
        for found, what, names in (
            (attention, "attention", ATTENTION_NAMES),
            (mlp, "MLP", MLP_NAMES),
            (o_proj, "output projection", OUTPUT_PROJECTION_NAMES),
        ):
            if found is None:
                raise UsageError(f"block {i} of {class_name} has no recognisable {what}: looked for {', '.join(names)}")
        blocks.append(Block(module, attention, mlp, o_proj))
    return blocks


def find_final_norm(model: nn.Module) -> nn.Module:
    """The norm between the last decoder block and the head of `model`, plain or wrapped.

    Raises:
        UsageError: there is none beside the blocks; the message names the class.
    """
    first = find_blocks(model)[0].module
    for parent in model.modules():
        children = list(parent.children())
        if any(isinstance(c, nn.ModuleList) and len(c) and c[0] is first for c in children):
            norms = [c for c in children if "Norm" in type(c).__name__]
            if norms:
                return norms[-1]
    raise UsageError(f"{type(unwrap(model)).__name__} has no norm between its blocks and its head")


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside DDP and PEFT wrappers."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _child(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    return next((getattr(module, name) for name in names if hasattr(module, name)), None)
