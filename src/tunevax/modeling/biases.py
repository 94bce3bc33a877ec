"""Vectors [hidden] that are added to the output of attention output projections, such as those of a safety lock."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tunevax.files import BIASES
from tunevax.modeling.blocks import find_blocks, innermost
from tunevax.modeling.precision import added


class AddedBias:
    """A forward hook that adds a vector [hidden] to a module's output. Nothing trains it and no state dict has it."""

    def __init__(self, bias: Tensor) -> None:
        self.bias = self.ready = bias

    def __call__(self, _module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """The output with the bias, in the output's dtype."""
        if self.ready.device != output.device or self.ready.dtype != output.dtype:
            self.ready = self.bias.to(output)
        return output + self.ready


def attach_biases(model: nn.Module, biases: Mapping[int, Tensor]) -> list[RemovableHandle]:
    """Add `biases[i]`, [hidden], to the output of block i's attention output projection, below any adapter on it."""
    blocks = find_blocks(model, "o_proj") if biases else []
    return [innermost(blocks[i].o_proj).register_forward_hook(AddedBias(bias)) for i, bias in biases.items()]


def attached_biases(model: nn.Module) -> dict[int, Tensor]:
    """The sum of the biases that are attached to `model`, by block."""
    if not any(isinstance(h, AddedBias) for m in model.modules() for h in m._forward_hooks.values()):
        return {}  # nor need there be blocks
    layers = enumerate(innermost(block.o_proj) for block in find_blocks(model, "o_proj"))
    by_block = {i: [h.bias for h in m._forward_hooks.values() if isinstance(h, AddedBias)] for i, m in layers}
    return {i: added(biases) for i, biases in by_block.items() if biases}


def save_biases(model: nn.Module, folder: Path) -> bool:
    """Write the biases attached to `model`, if any, beside its weights, for `load`; stock transformers ignores them."""
    if biases := attached_biases(model):
        write_biases(biases, folder)
    return bool(biases)


def write_biases(biases: Mapping[int, Tensor], folder: Path) -> None:
    """Write biases, [hidden] by block, for `load` to attach."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({str(i): bias.detach().float().cpu().contiguous() for i, bias in biases.items()}, folder / BIASES)


def read_biases(folder: str | Path) -> dict[int, Tensor]:
    """The biases in a folder, by block; none if it has no such file."""
    file = Path(folder) / BIASES
    return {int(i): bias for i, bias in load_file(file).items()} if file.is_file() else {}
