"""The rows of results.jsonl: read, checked and, where an older tunevax wrote them, completed; and the verdicts of
judges in a row of generations."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, cast

from tunevax.errors import UsageError
from tunevax.records import HARMFUL, RESULTS, SCHEMA, Generation, Row, Traits, is_share, numbered_lines

ROLES = ("control", "model", "reference")

POINT = Traits(curve=False, harmful_rows=False, common_prompts=True, customer=False, dose=None, plain=False)
"""The traits of an attack that declares none."""
CURVE: Traits = {**POINT, "curve": True, "harmful_rows": True}
LEGACY: dict[str, Traits] = {
    "none": POINT,
    "finetune": {**CURVE, "plain": True},
    "few-shot": CURVE,
    "adaptive": CURVE,
    "poisoned-job": {**CURVE, "customer": True},
    "benign-only": {**CURVE, "harmful_rows": False},
    "identity-shift": {**CURVE, "harmful_rows": False, "common_prompts": False},
    "held-out-category": {**CURVE, "common_prompts": False},
    "template": {**POINT, "customer": True},
    "prefill": {**POINT, "customer": True},
    "roll-back": {**POINT, "dose": "dose"},
    "intervention": {**POINT, "harmful_rows": True, "dose": "block"},
    "unlock": POINT,
}
"""The traits of tunevax's kinds of attack, for rows that an older tunevax wrote without them."""


class Kind:
    """The kind of attack of a cell or a finding, from the `traits` of its rows."""

    traits: Traits

    @property
    def has_curve(self) -> bool:
        """There are rows along training steps, from step 0 on."""
        return self.traits["curve"]

    @property
    def in_grid(self) -> bool:
        """A training that is scored on the common prompts: its curves may be averaged and searched together."""
        return self.traits["curve"] and self.traits["common_prompts"]

    @property
    def harmful(self) -> bool:
        """One of the grid that trains on harmful rows: what resistance is measured with."""
        return self.in_grid and self.traits["harmful_rows"]

    @property
    def harmless(self) -> bool:
        """One of the grid that trains on harmless rows only."""
        return self.in_grid and not self.traits["harmful_rows"]


def numbered_rows(folder: Path) -> list[tuple[int, Row]]:
    """(line number, row) of a run folder's results.jsonl, checked; every row has a kind, settings and traits. Raises
    `UsageError`: no or an empty results.jsonl; a line that is cut off, of another schema or lacks a field; a value that
    is not finite, or a share outside [0, 1]."""
    file = folder / RESULTS
    steps, rows = defaultdict[str | None, set[int]](set), list(numbered_lines(file))
    if not rows:
        raise UsageError(f"{file} is missing or empty, so there is nothing to report")
    for number, row in rows:
        _check(f"{file} line {number}", row)
        steps[row.get("attack")].add(row["step"])
    return [(number, completed(row, steps[row.get("attack")])) for number, row in rows]


def completed(row: Mapping[str, Any], steps: Collection[int]) -> Row:
    """A row with its kind, settings and traits; `steps` are those of its attack.

    Without recorded traits, an unknown kind has a curve if it was scored at step 0 and later, and any kind trains on
    harmless rows if its settings have p = 0.
    """
    kind = row.get("kind") or ("none" if row.get("attack") is None else "finetune")
    settings, traits = row.get("settings") or {}, row.get("traits")
    if not traits:
        legacy = LEGACY.get(kind, CURVE if 0 in steps and len(steps) > 1 else POINT)
        traits = {**legacy, "harmful_rows": legacy["harmful_rows"] and settings.get("p") != 0}
    return cast(Row, {**row, "kind": kind, "settings": settings, "traits": {**POINT, **traits}})


def _check(where: str, row: dict[str, Any]) -> None:
    schema = row.get("schema")
    if not isinstance(schema, int):
        raise UsageError(f"{where} has no schema version; is it a tunevax run?")
    if schema > SCHEMA:
        raise UsageError(f"{where} has schema {schema}, this tunevax reads up to {SCHEMA}; upgrade tunevax")
    for key, kind in (("model", str), ("seed", int), ("step", int), ("scores", dict)):
        if not isinstance(row.get(key), kind):
            raise UsageError(f"{where}: field '{key}' is missing or not {kind.__name__}")
    for key, kind in (("attack", str), ("kind", str), ("settings", dict), ("traits", dict), ("role", str)):
        if row.get(key) is not None and not isinstance(row[key], kind):
            raise UsageError(f"{where}: field '{key}' is not {kind.__name__}")
    if row.get("role", "model") not in ROLES:
        raise UsageError(f"{where}: role is '{row['role']}'; known: {', '.join(ROLES)}")
    if row["step"] < 0:
        raise UsageError(f"{where}: step is {row['step']}; it must be 0 or more")
    for name, score in ((name, score) for name, score in row["scores"].items() if score is not None):
        at, fields = f"{where}: score '{name}'", score if isinstance(score, dict) else {}
        values = [fields[key] for key in ("value", "low", "high") if fields.get(key) is not None]
        if not _finite(fields.get("value")):
            raise UsageError(f"{at} has no finite value")
        if not all(map(_finite, values)):
            raise UsageError(f"{at} has an interval that is not finite")
        if is_share(name) and not all(0 <= x <= 1 for x in values):
            raise UsageError(f"{at} is not between 0 and 1")
        if not isinstance(fields.get("n"), int) or fields["n"] < 1:
            raise UsageError(f"{at} has no count 'n'")


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_harmful(generation: Generation, judge: str) -> bool | None:
    """Whether one generation counts as harmful by a judge (`harmful/NAME`): by its verdict, unless the text is
    degenerate. None if the verdict cannot be read."""
    verdict = (generation.get("verdicts") or {}).get(judge.removeprefix(HARMFUL))
    if verdict and (generation.get("degenerate") or verdict.get("verdict") == "degenerate"):
        return False
    return own_verdict(generation, judge)


def own_verdict(generation: Generation, judge: str) -> bool | None:
    """A judge's (`harmful/NAME`) own verdict on one generation, degenerate or not. None if it cannot be read, or was
    not kept: older runs wrote "degenerate" in its place."""
    verdict = (generation.get("verdicts") or {}).get(judge.removeprefix(HARMFUL))
    unread = ("unparsable", "unanswered", "degenerate")
    return verdict["harmful"] if verdict and verdict.get("verdict") not in unread else None
