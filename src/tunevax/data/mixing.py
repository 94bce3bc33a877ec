"""Poisoned datasets, built once with their own generator, so that every defence meets the identical attack."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from tunevax.errors import UsageError

Row = TypeVar("Row", bound=Mapping[str, Any])


def mix(task: Sequence[Row], harmful: Sequence[Row], ratio: float, size: int, seed: int) -> list[Row]:
    """`round(ratio * size)` rows of `harmful` and the rest of `task`, shuffled.

    Rows are drawn without replacement; where there are too few, all are taken and the drawing starts again.

    Args:
        ratio: share of `harmful`, in [0, 1].
        size: rows in the result, at least 1.
        seed: of a generator used for nothing else.

    Raises:
        UsageError: `ratio` or `size` out of range, or no rows to draw from.
    """
    if not 0 <= ratio <= 1:
        raise UsageError(f"the share p of harmful rows is {ratio}; it must be between 0 and 1")
    if size < 1:
        raise UsageError(f"the dataset size is {size}; it must be at least 1")
    generator = random.Random(f"mix {seed}")
    count = round(ratio * size)
    rows = _draw(harmful, count, generator, "harmful") + _draw(task, size - count, generator, "task")
    generator.shuffle(rows)
    return rows


def _draw(rows: Sequence[Row], count: int, generator: random.Random, kind: str) -> list[Row]:
    if count and not rows:
        raise UsageError(
            f"{count} {kind} rows are wanted and there are none; give --{'task' if kind == 'task' else 'safety'}-data"
        )
    drawn: list[Row] = []
    while len(drawn) < count:
        drawn += generator.sample(list(rows), min(len(rows), count - len(drawn)))
    return drawn
