"""Finding the decoder blocks, their attention, MLP and output projection in a stock transformers model."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from tunevax.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION_NAMES = ("self_attn", "attention", "attn", "self_attention")
MIXER_NAMES = ("linear_attn", "linear_attention", "mamba", "mamba_decoder", "conv", "temporal_block", "mlstm_layer")
"""What mixes tokens instead of attention in some or all blocks of a model: linear attention, a state space, a short
convolution."""
# OPT has no MLP module: the output of its second linear is the MLP's output.
MLP_NAMES = ("mlp", "feed_forward", "ffn", "fc2", "block_sparse_moe", "moe", "mlp_block", "shared_mlp", "experts")
OUTPUT_PROJECTION_NAMES = ("o_proj", "out_proj", "dense", "c_proj", "wo")
FINAL_NORM_NAMES = ("norm", "final_layer_norm", "final_layernorm", "ln_f", "norm_f")
LOOKED_FOR = {
    "attention": (*ATTENTION_NAMES, *MIXER_NAMES, "mixer"), "mlp": MLP_NAMES, "o_proj": OUTPUT_PROJECTION_NAMES,
}  # fmt: skip
CALLED = {"attention": "attention", "mlp": "MLP", "o_proj": "attention output projection"}


class Block(NamedTuple):
    """One decoder block. Every field is the live module, so hooks on it act on the model.

    Attributes:
        module: the whole block, hidden states in, hidden states out.
        attention: its attention module, or what mixes tokens instead; its output (or the first element of it) is `e_l`
            of the papers, shape [batch, tokens, hidden], before the residual add. None if there is no such module.
        mlp: the module whose output is the MLP's output, [batch, tokens, hidden], or flattened to [batch x tokens,
            hidden] (OPT). Where experts run beside an MLP and no module gives their sum (Gemma 4), the norm behind it.
            None if there is no such module.
        o_proj: the output projection (possibly wrapped by a LoRA layer) of a softmax attention, else None.
    """

    module: nn.Module
    attention: nn.Module | None
    mlp: nn.Module | None
    o_proj: nn.Module | None


def find_blocks(model: nn.Module, *parts: str) -> list[Block]:
    """The decoder blocks of `model` (plain, PEFT-wrapped or DDP-wrapped), lowest first.

    `parts` are the fields of `Block` that the caller uses, of `attention`, `mlp`, `o_proj`; others may be None. Raises
    `UsageError` if there is no list of `num_hidden_layers` blocks, or a block has none of a part.
    """
    stock, names = unwrap(model), (*LOOKED_FOR["attention"], *MLP_NAMES)
    class_name = type(stock).__name__
    depth = getattr(stock.config.get_text_config(), "num_hidden_layers", None)
    # Beside the towers of other media, which may be as deep.
    decoder = stock.get_decoder() if hasattr(stock, "get_decoder") else None
    modules = (m for root in (decoder, stock) if root is not None for m in root.modules())
    lists = (m for m in modules if isinstance(m, nn.ModuleList) and len(m) == depth)
    found = next((m for m in lists if any(_child(block, names) is not None for block in m)), None)
    if found is None:
        raise UsageError(
            f"no decoder blocks found in {class_name}: looked for a ModuleList of {depth} blocks, each with one of "
            f"{', '.join(names)}"
        )
    blocks = [_block(module) for module in found]
    for part in parts:
        if without := [str(i) for i, block in enumerate(blocks) if getattr(block, part) is None]:
            one, only = len(without) == 1, "just one of " if part == "mlp" else ""
            which = f"block{'' if one else 's'} {', '.join(without[:4])}{', ...' if len(without) > 4 else ''}"
            raise UsageError(
                f"{'the blocks' if len(without) == depth else which} of {class_name} {'has' if one else 'have'} no "
                f"recognisable {CALLED[part]}: looked for {only}{', '.join(LOOKED_FOR[part])}"
            )
    return blocks


def find_final_norm(model: nn.Module) -> nn.Module:
    """The norm between the last decoder block and the head of `model`, plain or wrapped, or a `UsageError`."""
    first = find_blocks(model)[0].module
    for parent in model.modules():
        children = list(parent.children())
        if any(isinstance(c, nn.ModuleList) and len(c) and c[0] is first for c in children):
            norms = {name: c for name, c in parent.named_children() if "Norm" in type(c).__name__}
            if norms:  # of Gemma 4 one of them is of another kind
                return next((norms[name] for name in FINAL_NORM_NAMES if name in norms), list(norms.values())[-1])
    raise UsageError(
        f"{type(unwrap(model)).__name__} has no norm between its blocks and its head; plain sft works without"
    )


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside DDP and PEFT wrappers."""
    inner: Any = getattr(model, "module", model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def embedding(stock: PreTrainedModel) -> torch.Tensor:
    """The embedding of the tokens, [rows, hidden]."""
    inputs: Any = stock.get_input_embeddings()
    return inputs.weight


def plain_tokens(stock: PreTrainedModel) -> list[int]:
    """The ids that have an embedding and are no special token by the config (one that represents an image would need
    the image); 0 where all are special."""
    config = stock.config
    values = {**config.to_dict(), **config.get_text_config().to_dict()}
    special = {v for k, v in values.items() if k.endswith(("token_id", "token_index")) and isinstance(v, int)}
    count = min(len(embedding(stock)), config.get_text_config().vocab_size)
    return [i for i in range(count) if i not in special] or [0]


def _block(module: nn.Module) -> Block:
    softmax = _child(module, ATTENTION_NAMES)
    attention = softmax if softmax is not None else _child(module, MIXER_NAMES)
    mlps = [m for name in MLP_NAMES if (m := _child(module, (name,))) is not None]
    mlp = mlps[0] if mlps else None
    if len(mlps) > 1:  # experts beside an MLP
        mlp = _child(module, ("post_feedforward_layernorm",))
    mixer = _child(module, ("mixer",))  # of Mamba and Nemotron-H: one module, of any kind
    if mixer is not None and attention is None:
        kind = type(mixer).__name__
        if re.search("MLP|MoE|Moe", kind):
            mlp = mixer
        else:
            attention = mixer
            softmax = mixer if "Attention" in kind else None
    return Block(module, attention, mlp, None if softmax is None else _child(softmax, OUTPUT_PROJECTION_NAMES))


def _child(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    """The first of these children that there is; a list of modules is never called itself."""
    children = (getattr(module, name, None) for name in names)
    return next((c for c in children if isinstance(c, nn.Module) and not isinstance(c, nn.ModuleList)), None)


def innermost(module: nn.Module | None) -> Any:
    """The layer that PEFT has wrapped, however often; the module itself if it has not."""
    inner: Any = module
    while hasattr(inner, "base_layer"):
        inner = inner.base_layer
    return inner
