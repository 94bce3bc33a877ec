"""An exact count of live tensor storages on the CPU, and the device allocator's own peak elsewhere."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback, TrainingArguments


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of every storage that an operation inside the block returns and that is still referenced.

    Storages created before the block count through `track`. Exact for what autograd and Python hold; workspaces inside
    a kernel are not seen. What an operation returns is of kind `made`, until `mark` says otherwise.
    """

    made = "activations"
    counts_meta = False  # tensors without content take no memory; a plan counts what they would take

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0  # bytes alive now, and the most that were alive at once
        self.kinds: Counter[str] = Counter()  # bytes alive now, by kind
        self.at_peak: dict[str, int] = {}  # `kinds` as they were at the peak
        self._seen: dict[int, tuple[weakref.ref, list[str]]] = {}  # the kind is in a list: it may change

    def __enter__(self) -> Any:
        _counting.append(self)
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        _counting.remove(self)
        super().__exit__(*error)

    def track(self, *tensors: torch.Tensor, kind: str | None = None) -> None:
        """Add the storages of these tensors, each once, until they are freed."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._seen or (tensor.device.type == "meta" and not self.counts_meta):
                continue
            size, label = storage.nbytes(), [kind or self.made]
            self.live += size
            self.kinds[label[0]] += size

            def gone(_ref: object, key: int = key, size: int = size, label: list[str] = label) -> None:
                self.live -= size
                self.kinds[label[0]] -= size
                del self._seen[key]

            self._seen[key] = weakref.ref(storage, gone), label
        if self.live > self.peak:
            self.peak, self.at_peak = self.live, dict(self.kinds)

    def mark(self, kind: str, *tensors: torch.Tensor) -> None:
        """Set the kind of these tensors. Those not seen before are tracked."""
        self.track(*tensors, kind=kind)
        for storage in (tensor.untyped_storage() for tensor in tensors):
            if storage._cdata in self._seen:
                _, label = self._seen[storage._cdata]
                self.kinds[label[0]] -= storage.nbytes()
                self.kinds[kind] += storage.nbytes()
                label[0] = kind

    def __torch_dispatch__(self, func: OpOverload, types: object, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.track(*(leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)))
        return result


_counting: list[LiveMemory] = []


def mark(kind: str, tensors: Iterable[torch.Tensor]) -> None:
    """Report the kind of these tensors to every memory counter that is active, such as that of a plan."""
    for memory in _counting:
        memory.mark(kind, *tensors)


class StepMemory(TrainerCallback):
    """Measures one whole step of a training run on the CPU: weights, gradients, optimiser state, activations."""

    peak: int | None = None  # bytes; None on an accelerator, whose allocator keeps its own

    def on_step_begin(self, args: TrainingArguments, *_: object, model: nn.Module, **__: object) -> None:  # type: ignore[override]
        """Start counting at the first step of this process."""
        if self.peak is None and args.device.type == "cpu":
            self.peak, self.live = 0, LiveMemory()
            self.live.__enter__()
            self.live.track(*model.parameters(), *model.buffers())

    def on_step_end(self, *_: object, **__: object) -> None:
        """Stop counting."""
        if self.peak == 0:
            self.live.__exit__(None, None, None)
            self.peak = self.live.peak
