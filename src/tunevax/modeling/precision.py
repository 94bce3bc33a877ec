"""The precision of statistics, losses and trainables: fp32 at least."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable

import torch


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in fp32, or as it is where it has float64: norms, divergences, losses and optimiser states are never
    computed in less, and an identity checked in float64 is not cut to fp32 on the way."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def added(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """The sum of at least one tensor, in their order."""
    return functools.reduce(operator.add, tensors)
