"""Context managers that capture, perturb, replay and recompute inside a stock model; each removes its hooks on exit.

A perturbation stays attached until after `backward()`: activation checkpointing runs the forward again during the
backward pass, and without the hook that second forward would be unperturbed and the gradients silently wrong.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tunevax.modeling.memory import mark

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

CAST = "_cast_input_dtype"  # the method of PEFT's layers that casts an input to the adapter's dtype


def tensor_of(output: Any) -> torch.Tensor:
    """The hidden-state tensor of a module output, which is a tensor or a tuple that starts with one."""
    return output[0] if isinstance(output, tuple) else output


def entering(args: tuple, kwargs: dict) -> torch.Tensor:
    """The hidden states that a block is called with."""
    return args[0] if args else kwargs["hidden_states"]


def _passed_on(hidden: torch.Tensor, length: int) -> tuple | torch.Tensor:
    """`hidden` as the output of a block that returns a tuple of this length, or a bare tensor (0)."""
    return (hidden, *[None] * (length - 1)) if length else hidden


@contextmanager
def attached(handles: Sequence[RemovableHandle]) -> Iterator[None]:
    """Hooks that are removed on exit."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def with_tensor(output: Any, tensor: torch.Tensor) -> Any:
    """`output` with its hidden-state tensor replaced, its type kept."""
    return (tensor, *output[1:]) if isinstance(output, tuple) else tensor


@contextmanager
def capture(modules: Mapping[int, nn.Module], leaf: int | None = None) -> Iterator[dict[int, torch.Tensor]]:
    """Collect the output of each module, by key, as a tensor that `torch.autograd.grad` accepts as input. The output of
    the lowest one, whose key is `leaf`, becomes a detached leaf that requires grad: the graph starts there."""
    captured: dict[int, torch.Tensor] = {}

    def hook(key: int, _module: nn.Module, _args: object, output: Any) -> Any:
        tensor = tensor_of(output)
        if key == leaf:
            tensor = tensor.detach().requires_grad_()
        # Only the first call counts: a recomputation during backward passes here again.
        captured.setdefault(key, tensor)
        return with_tensor(output, tensor) if key == leaf else None

    with attached([m.register_forward_hook(functools.partial(hook, key)) for key, m in modules.items()]):
        yield captured


@contextmanager
def capture_inputs(modules: Sequence[nn.Module]) -> Iterator[dict[int, torch.Tensor]]:
    """Collect the hidden states that enter each of these blocks, by number."""
    captured: dict[int, torch.Tensor] = {}

    def hook(key: int, _module: nn.Module, args: tuple, kwargs: dict) -> None:
        captured.setdefault(key, entering(args, kwargs))

    hooks = [functools.partial(hook, key) for key in range(len(modules))]
    with attached([m.register_forward_pre_hook(h, with_kwargs=True) for m, h in zip(modules, hooks, strict=True)]):
        yield captured


@contextmanager
def perturb(modules: Mapping[int, nn.Module], offsets: Mapping[int, torch.Tensor]) -> Iterator[None]:
    """Add `offsets[key]` (shape of the output) to the output of each module. Keep it open until after backward."""

    def hook(key: int, _module: nn.Module, _args: object, output: Any) -> Any:
        return with_tensor(output, tensor_of(output) + offsets[key].to(tensor_of(output).dtype))

    mark("perturbations", offsets.values())
    with attached([modules[key].register_forward_hook(functools.partial(hook, key)) for key in offsets]):
        yield


class Prefix:
    """The output of the blocks below the first trained one, computed once and used in every pass over the same batch.
    With no block below, where embeddings may train, passes run untouched."""

    def __init__(self, blocks: Sequence[nn.Module], start: int) -> None:
        self.below, self.entry = blocks[:start], blocks[start]  # the latter is the first with a graph
        self.hidden: torch.Tensor | None = None
        self.lengths: list[int] = []  # of the tuple each prefix block returns, 0 for a bare tensor

    @contextmanager
    def record(self) -> Iterator[None]:
        """Run the prefix without a graph and keep the hidden states that enter block `start`."""
        if not self.below:
            yield
            return

        def forward(original: Callable[..., Any], *args: object, **kwargs: object) -> Any:
            with torch.no_grad():
                output = original(*args, **kwargs)
            self.lengths.append(len(output) if isinstance(output, tuple) else 0)
            return output

        def keep(_module: nn.Module, args: tuple, kwargs: dict) -> None:
            if self.hidden is None:
                self.hidden = entering(args, kwargs).detach()

        with self.entry.register_forward_pre_hook(keep, with_kwargs=True), replaced_forward(self.below, forward):
            yield

    @contextmanager
    def replay(self) -> Iterator[None]:
        """Let the prefix return at once and feed block `start` the recorded hidden states."""
        if not self.below:
            yield
            return
        lengths = iter(self.lengths)

        def forward(_original: object, *args: object, **kwargs: object) -> Any:
            return _passed_on(entering(args, kwargs), next(lengths))

        def enter(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            return ((self.hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": self.hidden})

        with self.entry.register_forward_pre_hook(enter, with_kwargs=True), replaced_forward(self.below, forward):
            yield


@contextmanager
def passed_through(blocks: Sequence[nn.Module], below: nn.Module) -> Iterator[None]:
    """Let `blocks` hand on what they are given: the forward ends, in effect, with `below`, the block before them."""
    length = 0  # of the tuple a block returns, 0 for a bare tensor

    def look(_module: nn.Module, _args: tuple, output: object) -> None:
        nonlocal length
        length = len(output) if isinstance(output, tuple) else 0

    def forward(_original: object, *args: object, **kwargs: object) -> Any:
        return _passed_on(entering(args, kwargs), length)

    with below.register_forward_hook(look), replaced_forward(blocks, forward):
        yield


@contextmanager
def replaced_forward(modules: Sequence[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Replace the `forward` of each module by `forward(original, *args, **kwargs)`; what was there comes back."""
    before = [module.__dict__.get("forward") for module in modules]  # of accelerate's device hooks, for one
    for module in modules:
        module.forward = functools.partial(forward, module.forward)
    try:
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            if own is None:
                del module.forward
            else:
                module.forward = own


def checkpointed(blocks: Sequence[nn.Module]) -> AbstractContextManager[None]:
    """Recompute these blocks in the backward pass; the reentrant form drops gradients if no input requires them."""

    def forward(original: Callable[..., Any], *args: object, **kwargs: object) -> Any:
        return checkpoint(functools.partial(original, **kwargs), *args, use_reentrant=False)

    return replaced_forward(blocks, forward)


def without_dropout(modules: Sequence[nn.Module]) -> AbstractContextManager[None]:
    """Put these modules in eval mode at each forward, whatever the trainer sets in between."""

    def hook(module: nn.Module, _args: object) -> None:
        if module.training:
            module.eval()

    return attached([m.register_forward_pre_hook(hook) for m in modules])


@contextmanager
def still(module: nn.Module) -> Iterator[None]:
    """`module` is in evaluation mode inside, and each of its modules in its own mode after."""
    training = [m for m in module.modules() if m.training]
    module.eval()
    try:
        yield
    finally:
        for m in training:
            m.training = True


@contextmanager
def cheap_recomputed(cheap: Sequence[nn.Module]) -> Iterator[None]:
    """Keep matrix products and recompute what is cheap: where autograd would save the output of one of these norms
    and activation functions, save how to make it again from its input, which is saved anyway. Likewise the input of an
    adapter over a half-precision layer, which PEFT casts to fp32, anew for each of the layers that share it."""
    recipes: dict[int, tuple[Any, ...]] = {}  # storage of a cheap output -> how to make it

    def remember(again: Callable[..., Any], source: torch.Tensor, output: torch.Tensor) -> None:
        if not torch.is_grad_enabled() or not output.is_contiguous():
            return
        storage = output.untyped_storage()
        key = storage._cdata
        recipes[key] = (again, source.detach(), source._version, output._version)
        weakref.finalize(storage, recipes.pop, key, None).atexit = False

    def ran(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        if torch.is_tensor(output) and len(args) == 1:
            remember(functools.partial(type(module).forward, module), args[0], output)

    def cast(stock: Callable[..., Any], source: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        output = stock(source, dtype)
        if output is not source:
            remember(functools.partial(torch.Tensor.to, dtype=dtype), source, output)
        return output

    def pack(tensor: torch.Tensor) -> Any:
        recipe = recipes.get(tensor.untyped_storage()._cdata)
        # An output changed in place is no longer what the module gave. A view shares its base's version.
        if recipe is None or isinstance(tensor, nn.Parameter) or tensor._version != recipe[3]:
            return tensor.detach()  # itself, it would keep the operation that made it, and that one it
        return recipe, tensor.shape, tensor.stride(), tensor.storage_offset()

    def unpack(packed: Any) -> torch.Tensor:
        if torch.is_tensor(packed):
            return packed
        (again, source, version, *_), *view = packed
        if source._version != version:
            raise RuntimeError(f"the input of {again} was changed in place before its backward")
        with torch.no_grad():
            return again(source).as_strided(*view)

    def norm(original: Any, *args: torch.Tensor, **kwargs: object) -> Any:
        if args[0].dtype in (torch.float32, torch.float64) or not torch.is_grad_enabled():
            return original(*args, **kwargs)
        return checkpoint(functools.partial(original, **kwargs), *args, use_reentrant=False, preserve_rng_state=False)

    norms = [m for m in cheap if type(m).__name__.endswith("Norm")]
    adapters = [m for m in cheap if hasattr(m, CAST)]
    handles = [m.register_forward_hook(ran) for m in cheap if not hasattr(m, CAST)]
    for adapter in adapters:
        setattr(adapter, CAST, functools.partial(cast, getattr(adapter, CAST)))
    try:
        with attached(handles), replaced_forward(norms, norm), torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        for adapter in adapters:
            delattr(adapter, CAST)


def cheap_modules(block: nn.Module) -> list[nn.Module]:
    """The norms and activation functions in a block, which have no matrix product, and its adapters."""
    from transformers.activations import ACT2CLS

    kinds: tuple[Any, ...] = tuple(k[0] if isinstance(k, tuple) else k for k in ACT2CLS.values())
    return [m for m in block.modules() if type(m).__name__.endswith("Norm") or isinstance(m, kinds) or hasattr(m, CAST)]


def has_dropout(model: nn.Module) -> bool:
    """Whether training mode makes any difference to the forward of this model."""
    dropouts = (m.p for m in model.modules() if isinstance(m, nn.Dropout))
    return any(dropouts) or bool(getattr(getattr(model, "config", None), "attention_dropout", 0))
