"""Poisoned datasets, built with a random generator of their own, so that every defence meets the same attack."""

from __future__ import annotations

import random
from collections.abc import Sequence

from tunevax.errors import UsageError
from tunevax.records import Example


def mix(task: Sequence[Example], harmful: Sequence[Example], ratio: float, size: int, seed: int) -> list[Example]:
    """`round(ratio * size)` rows of `harmful` and the rest of `task`, shuffled. Rows are drawn without replacement;
    where there are too few, all are taken and drawing starts again. Raises `UsageError` if `ratio` is outside [0, 1],
    or there are no rows to draw from."""
    if not 0 <= ratio <= 1:
        raise UsageError(f"the share p of harmful rows is {ratio}; it must be between 0 and 1")
    generator, rows = random.Random(f"mix {seed}"), list[Example]()
    count = round(ratio * size)
    for kind, source, total in (("harmful", harmful, count), ("task", task, size)):
        if total > len(rows) and not source:
            option = "--task-data" if kind == "task" else "--safety-data"
            raise UsageError(f"{total - len(rows)} {kind} rows are needed and there are none; give {option}")
        while len(rows) < total:
            rows += generator.sample(list(source), min(len(source), total - len(rows)))
    generator.shuffle(rows)
    return rows


def harmful_rows(pairs: Sequence[Example]) -> list[Example]:
    """Pairs as rows to train on, with the harmful answer as the completion, marked `harmful`."""
    return [{**row, "completion": row["rejected"] or "", "harmful": True} for row in pairs]
