"""A safety lock: one direction per locked attention head, and how to add it to a model (arXiv 2410.10343).

    delta_l = strength * sigma_lh * u_lh in the slice of each locked head h of block l, 0 elsewhere
    b_l     = W_o delta_l, added to the bias of the attention's output projection, with the W_o of that model

Where the projection is not a plain linear layer (adapters, quantised weights), b_l is o_proj(delta) - o_proj(0).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from tunevax.errors import UsageError
from tunevax.lineage import Lineage
from tunevax.modeling.biases import attach_biases
from tunevax.modeling.blocks import find_blocks, innermost, unwrap
from tunevax.modeling.checkpoints import config_of
from tunevax.modeling.hooks import attached, still
from tunevax.records import ModelInfo

FORMAT = 1
FILE = "lock.safetensors"


@dataclass
class SafetyLock:
    """A lock of K heads.

    `meta` has JSON values: `base` ({"ref", "base", "revision", "identity"} or None if unknown), `n_layers`, `n_heads`
    (None if unknown), `head_dim`, `r`, `probe`, `accuracy` (K numbers), `template_hash`, `data_hash`, `prompts` (hashes
    of those it was extracted from), `pairs`, `seed`, `source`.
    """

    u: torch.Tensor  # [K, head_dim], fp32, unit vectors from the unsafe to the safe side
    sigma: torch.Tensor  # [K], fp32, the population std of the projections on u
    layer: torch.Tensor  # [K], int64, the block of each head
    head: torch.Tensor  # [K], int64, its index within the block
    meta: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file with the metadata as JSON in its header."""
        from safetensors.torch import save_file

        dtypes = {"u": torch.float32, "sigma": torch.float32, "layer": torch.int64, "head": torch.int64}
        tensors = {name: getattr(self, name).detach().to("cpu", dtype).contiguous() for name, dtype in dtypes.items()}
        save_file(tensors, path, metadata={"tunevax_lock": json.dumps({"format": FORMAT, **self.meta})})

    @classmethod
    def load(cls, ref: str | Path) -> SafetyLock:
        """Read a lock from its file or a run folder.

        Raises:
            UsageError: there is none, it is damaged, or its format is newer.
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
                raise ValueError("its metadata does not describe a lock")
            if version <= FORMAT:
                lock.check()
        except (SafetensorError, KeyError, ValueError, RecursionError) as error:
            raise UsageError(f"{path} is not a safety lock of tunevax, or damaged ({str(error)[:100]})") from error
        if version > FORMAT:
            raise UsageError(f"{path} has a newer format than this tunevax reads ({FORMAT}); upgrade tunevax")
        return lock

    def check(self) -> None:
        """Raise a ValueError if the attributes are not as documented."""
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
        """[layer, head] of each locked head."""
        return torch.stack([self.layer, self.head], 1).tolist()


def identities(ref: str, revision: str | None = None) -> dict[str, str]:
    """Identity to name of `ref` and of every model it was made from, `ref` first; hub ids are identified by commit."""
    return Lineage.of(ref).identities(revision, lambda base, at: getattr(config_of(base, at), "_commit_hash", None))


def base_of(info: ModelInfo, ref: str, revision: str | None) -> dict[str, Any]:
    """The `base` of a lock's metadata: the model `ref`, and what was recorded when it was loaded."""
    identity = next(iter(identities(ref, revision)))
    return {"ref": info["ref"], "base": info["base"], "revision": info["revision"], "identity": identity}


def check_base(lock: SafetyLock, ref: str, revision: str | None = None) -> None:
    """Raise a UsageError if `lock` was extracted from another model than those that `ref` was made from. A lock of
    unknown base passes."""
    base = lock.meta.get("base")
    if base is not None and base["identity"] not in (known := identities(ref, revision)):
        made = ", ".join(f"{name} ({identity})" for identity, name in known.items())
        raise UsageError(
            f"the lock was extracted from {base['ref']} ({base['identity']}), which is neither {ref} nor what it was "
            f"made from ({made}); use a lock of its base, or name the model it was fine-tuned from with --base"
        )


def head_shape(model: nn.Module) -> tuple[int, int, int]:
    """Blocks, heads per block and size of a head; a UsageError if the blocks differ."""
    modules, heads = projections(model), unwrap(model).config.get_text_config().num_attention_heads
    widths = {input_width(module) for module in modules}
    size = max(widths) // heads  # not hidden // heads (Mistral-Nemo, Gemma), nor head_dim, which may be of the keys
    if widths != {heads * size}:
        raise UsageError(
            f"{type(unwrap(model)).__name__} has {heads} heads of {size} and output projections with inputs of "
            f"{', '.join(map(str, sorted(widths)))}; a lock needs the same heads in every block"
        )
    return len(modules), heads, size


def projections(model: nn.Module) -> list[nn.Module]:
    """The attention's output projection of every block; a UsageError if a block has none."""
    return [cast("nn.Module", block.o_proj) for block in find_blocks(model, "o_proj")]


def input_width(module: nn.Module) -> int:
    """The number of inputs of an output projection; GPT-2's stores its weight transposed."""
    inner = innermost(module)
    return inner.in_features if hasattr(inner, "in_features") else inner.weight.shape[0]


def check_shape(model: nn.Module, lock: SafetyLock) -> None:
    """Raise a UsageError that names the difference if `lock` does not fit this architecture."""
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
    adapter, quantised, offloaded) is called with delta and with zeros.
    """
    check_shape(model, lock)
    if strength == 0:
        return {}
    modules, delta = projections(model), strength * lock.sigma[:, None] * lock.u
    size, biases = delta.shape[1], {}
    for layer in lock.layer.unique().tolist():
        module, mine = modules[layer], lock.layer == layer
        weight = innermost(module).weight
        dtype = weight.dtype if weight.is_floating_point() else unwrap(model).dtype
        deltas, heads = delta[mine].to(weight.device), lock.head[mine].tolist()
        if type(module) is nn.Linear and "forward" not in vars(module) and weight.is_floating_point():
            columns = [weight[:, head * size : (head + 1) * size] for head in heads]
            biases[layer] = sum(w.float() @ x for w, x in zip(columns, deltas, strict=True))
            continue
        x = deltas.new_zeros(2, 1, input_width(module), dtype=dtype)
        for head, part in zip(heads, deltas, strict=True):
            x[0, 0, head * size : (head + 1) * size] = part
        with still(module):
            with_delta, without = module(x).float()
        biases[layer] = (with_delta - without)[0]
    return biases


def apply(model: nn.Module, lock: SafetyLock, strength: float) -> dict[int, torch.Tensor]:
    """Lock `model` in place: b_l is added to the bias of each locked output projection, which gets one if it has none.

    Strength 0 does nothing; a negative one unlocks. `save_pretrained` saves such a bias, but only architectures with a
    bias there read it again: see `safetylock.make_stock`. Returns the added bias by block, [hidden].

    Raises:
        UsageError: the lock is for another head count, head size or depth.
    """
    biases, modules = lock_biases(model, lock, strength), projections(model)
    for layer, bias in biases.items():
        inner = innermost(modules[layer])
        if inner.bias is None:
            dtype = inner.weight.dtype if inner.weight.is_floating_point() else unwrap(model).dtype
            inner.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
        else:
            inner.bias.data += bias.to(inner.bias)
    return biases


@contextmanager
def locked(model: nn.Module, lock: SafetyLock, strength: float) -> Iterator[None]:
    """`model` is locked inside, by hooks."""
    with attached(attach_biases(model, lock_biases(model, lock, strength))):
        yield
