"""A safety lock: one direction per locked attention head, and what it takes to put it on a model (arXiv 2410.10343).

    delta_l = strength * sigma_lh * u_lh in the slice of each locked head h of block l, 0 elsewhere
    b_l     = W_o delta_l, added to the bias of the attention's output projection, with the W_o of the model at hand

Where the projection is more than a linear layer, b_l is o_proj(delta) - o_proj(0) through the module, so that adapters
and quantised weights count.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tunevax.errors import UsageError
from tunevax.lineage import Lineage
from tunevax.modeling.batches import still
from tunevax.modeling.biases import attach_biases
from tunevax.modeling.blocks import find_blocks, innermost, unwrap
from tunevax.modeling.checkpoints import config_of

FORMAT = 1
FILE = "lock.safetensors"


@dataclass
class SafetyLock:
    """A lock, as it is in memory and in its file.

    Attributes:
        u: [K, head_dim], fp32, unit vectors from the unsafe to the safe side.
        sigma: [K], fp32, the population std of the projections on u.
        layer: [K], int64, the block of each head.
        head: [K], int64, its number within the block.
        meta: JSON values: `base` ({"ref", "base", "revision", "identity"} or None if unknown), `n_layers`, `n_heads`
            (None if unknown), `head_dim`, `r`, `probe`, `accuracy` (K numbers), `template_hash`, `data_hash`,
            `prompts` (hashes of what it was extracted from), `pairs`, `seed`, `source`.
    """

    u: torch.Tensor
    sigma: torch.Tensor
    layer: torch.Tensor
    head: torch.Tensor
    meta: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, the metadata as JSON in its header."""
        from safetensors.torch import save_file

        tensors = {
            "u": self.u.float(), "sigma": self.sigma.float(), "layer": self.layer.long(), "head": self.head.long(),
        }  # fmt: skip
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(tensors, path, metadata={"tunevax_lock": json.dumps({"format": FORMAT, **self.meta})})

    @classmethod
    def load(cls, ref: str | Path) -> SafetyLock:
        """Read a lock from its file, or from the run folder that holds one.

        Raises:
            UsageError: there is none, it is damaged, or it is of a newer format.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(ref) / FILE if Path(ref).is_dir() else Path(ref)
        if not path.is_file():
            raise UsageError(f"no lock at {ref}; make one with `tunevax restore extract-lock`")
        if path.suffix == ".safelock":
            raise UsageError(f"{ref} is a published .safelock; convert it with `tunevax restore convert-lock`")
        try:
            with safe_open(path, "pt") as file:
                meta = json.loads((file.metadata() or {})["tunevax_lock"])
                u, sigma, layer, head = (file.get_tensor(name) for name in ("u", "sigma", "layer", "head"))
            lock = cls(u, sigma, layer, head, meta)
            if not isinstance(meta, dict) or not isinstance(version := meta.pop("format", 0), int):
                raise ValueError("its metadata is no description of a lock")
            if version <= FORMAT:
                lock.check()
        except (SafetensorError, KeyError, ValueError, RecursionError) as error:
            raise UsageError(f"{path} is not a safety lock of tunevax, or damaged ({str(error)[:100]})") from error
        if version > FORMAT:
            raise UsageError(f"{path} has a newer format than this tunevax reads ({FORMAT}); upgrade tunevax")
        return lock

    def check(self) -> None:
        """Raise a ValueError if this is not what the attributes are said to be."""
        k, meta = self.sigma.numel(), self.meta
        sizes = [meta.get(name) for name in ("head_dim", "n_layers", "n_heads")]
        if type(sizes[0]) is not int or any(type(size) not in (int, type(None)) for size in sizes):
            raise ValueError("no head_dim, n_layers or n_heads that is a number")
        shapes = {"u": (k, sizes[0]), "sigma": (k,), "layer": (k,), "head": (k,)}
        if k == 0 or any(getattr(self, name).shape != shape for name, shape in shapes.items()):
            raise ValueError(f"its tensors do not have the shapes of {k} heads")
        if any(x.dtype != torch.float32 or not x.isfinite().all() for x in (self.u, self.sigma)):
            raise ValueError("its directions or scales are not finite numbers in fp32")
        if any(x.dtype != torch.int64 or (x < 0).any() for x in (self.layer, self.head)):
            raise ValueError("its blocks or heads are not numbers from 0")
        base = meta.get("base")
        if base is not None and not (isinstance(base, dict) and {"ref", "identity"} <= set(base)):
            raise ValueError("its base has no name or no identity")
        prompts = meta.get("prompts") or []
        if not isinstance(prompts, list) or not all(isinstance(p, str) for p in prompts):
            raise ValueError("its prompts are not hashes")

    def named(self) -> list[list[int]]:
        """[layer, head] of each locked head, for a record."""
        return torch.stack([self.layer, self.head], 1).tolist()


def identities(ref: str, revision: str | None = None) -> dict[str, str]:
    """Identity to name of `ref` and of every model it was made from, itself first; of a hub id by its commit."""
    return Lineage.of(ref).identities(revision, lambda base, at: getattr(config_of(base, at), "_commit_hash", None))


def check_base(lock: SafetyLock, ref: str, revision: str | None = None) -> None:
    """Raise a UsageError if `lock` was extracted from another model than those that `ref` was made from. A lock that
    does not say where it comes from (an imported one) passes."""
    base = lock.meta.get("base")
    if base is None:
        return
    known = identities(ref, revision)
    if base["identity"] not in known:
        made = ", ".join(f"{name} ({identity})" for identity, name in known.items())
        raise UsageError(
            f"the lock was extracted from {base['ref']} ({base['identity']}), which is neither {ref} nor what it was "
            f"made from ({made}): take a lock of its base, or name the model it was fine-tuned from with --base"
        )


def head_shape(model: nn.Module) -> tuple[int, int, int]:
    """Blocks, heads per block and size of a head, the same in every block.

    Raises:
        UsageError: the input of an output projection is not that many heads of that size.
    """
    blocks, config = find_blocks(model, "o_proj"), unwrap(model).config.get_text_config()
    widths = {input_width(block.o_proj) for block in blocks}
    heads = config.num_attention_heads
    size = max(widths) // heads  # not hidden // heads (Mistral-Nemo, Gemma), nor head_dim, which may be of the keys
    if widths != {heads * size}:
        raise UsageError(
            f"{type(unwrap(model)).__name__} has {heads} heads of {size}, and output projections that take "
            f"{', '.join(map(str, sorted(widths)))}; a lock needs the same heads in every block"
        )
    return len(blocks), heads, size


def input_width(module: nn.Module) -> int:
    """What an output projection takes; GPT-2's stores its weight the other way round."""
    inner = innermost(module)
    return inner.in_features if hasattr(inner, "in_features") else inner.weight.shape[0]


def check_shape(model: nn.Module, lock: SafetyLock) -> None:
    """Raise a UsageError that names the difference if `lock` cannot be of this architecture."""
    blocks, heads, size = head_shape(model)
    name = type(unwrap(model)).__name__
    for what, has, wants in (
        ("heads of size", size, lock.meta["head_dim"]),
        ("blocks", blocks, lock.meta.get("n_layers") or blocks),
        ("heads in a block", heads, lock.meta.get("n_heads") or heads),
    ):
        if has != wants:
            raise UsageError(f"the lock is for {what} {wants} and {name} has {has}; use a lock of its own base")
    for what, last, count in (("block", lock.layer.max(), blocks), ("head", lock.head.max(), heads)):
        if last >= count:
            raise UsageError(f"the lock has {what} {int(last)} and {name} has {count} of them; use a lock of its base")


@torch.no_grad()
def lock_biases(model: nn.Module, lock: SafetyLock, strength: float) -> dict[int, torch.Tensor]:
    """b_l of each locked block, [hidden], fp32.

    A plain linear layer is multiplied by the columns of its locked heads alone; any other output projection (with an
    adapter, quantised, offloaded) is called twice, with delta and with zeros.

    Raises:
        UsageError: the lock is for another head count, head size or depth.
    """
    check_shape(model, lock)
    if strength == 0:
        return {}
    blocks, delta = find_blocks(model), strength * lock.sigma[:, None] * lock.u
    size, found = delta.shape[1], {}
    for layer in lock.layer.unique().tolist():
        module, mine = blocks[layer].o_proj, lock.layer == layer
        weight = innermost(module).weight
        dtype = weight.dtype if weight.is_floating_point() else unwrap(model).dtype
        deltas, heads = delta[mine].to(weight.device), lock.head[mine].tolist()
        if type(module) is nn.Linear and "forward" not in vars(module) and weight.is_floating_point():
            columns = [weight[:, head * size : (head + 1) * size] for head in heads]
            found[layer] = sum(w.float() @ x for w, x in zip(columns, deltas, strict=True))
            continue
        x = deltas.new_zeros(2, 1, input_width(module), dtype=dtype)
        for head, part in zip(heads, deltas, strict=True):
            x[0, 0, head * size : (head + 1) * size] = part
        with still(module):
            with_delta, without = module(x).float()
        found[layer] = (with_delta - without)[0]
    return found


def apply(model: nn.Module, lock: SafetyLock, strength: float) -> dict[int, torch.Tensor]:
    """Lock `model` in place: b_l is added to the bias of each locked output projection, which gets one if it has none.

    Nothing else changes. Strength 0 does nothing; a negative one unlocks. `save_pretrained` saves such a bias, but it
    is only read back where the architecture has one: see `safetylock.make_stock`.

    Returns:
        What was added, [hidden] by block.

    Raises:
        UsageError: the lock is for another head count, head size or depth.
    """
    biases, blocks = lock_biases(model, lock, strength), find_blocks(model)
    for layer, bias in biases.items():
        inner = innermost(blocks[layer].o_proj)
        if inner.bias is None:
            dtype = inner.weight.dtype if inner.weight.is_floating_point() else unwrap(model).dtype
            inner.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
        else:
            inner.bias.data += bias.to(inner.bias)
    return biases


@contextmanager
def locked(model: nn.Module, lock: SafetyLock, strength: float) -> Iterator[None]:
    """`model` is locked inside, by hooks, and as it was outside, also after an exception."""
    handles = attach_biases(model, lock_biases(model, lock, strength))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
