"""Poisoned datasets, built with a random generator of their own, so that every defence meets the same attack."""

from __future__ import annotations

import random
from collections.abc import Sequence

from tunevax.errors import UsageError
from tunevax.records import Example


def mix(task: Sequence[Example], harmful: Sequence[Example], ratio: float, size: int, seed: int) -> list[Example]:
    """`round(ratio * size)` rows of `harmful` and the rest of `task`, shuffled.

    Rows are drawn without replacement; where there are too few, all are taken and drawing starts again.

    Raises:
        UsageError: `ratio` is outside [0, 1], `size` is below 1, or there are no rows to draw from.
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


def harmful_rows(pairs: Sequence[Example]) -> list[Example]:
    """Pairs as rows to train on, with the harmful answer as the completion, marked `harmful`."""
    return [{**row, "completion": row["rejected"] or "", "harmful": True} for row in pairs]


def _draw(rows: Sequence[Example], count: int, generator: random.Random, kind: str) -> list[Example]:
    if count and not rows:
        raise UsageError(
            f"{count} {kind} rows are needed and there are none; give --{'task' if kind == 'task' else 'safety'}-data"
        )
    drawn: list[Example] = []
    while len(drawn) < count:
        drawn += generator.sample(list(rows), min(len(rows), count - len(drawn)))
    return drawn
