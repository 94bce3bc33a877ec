"""Overlap between the prompts that a model was trained on, is attacked with and is scored on.

Every run that uses prompts keeps their hashes in prompts.json, `{role: [hash, ...]}`. The roles are `alignment` (safety
rows of a defence, with whatever chose or tuned it), `benign` (harmless rows beside them), `task` (a customer's rows)
and `attack` (harmful rows of an attack whose weights were kept). A model has been trained on the prompts of its run and
of every run below it.

No prompt that the model or the attack on it was trained on is scored on, and the harmful rows of an attack are new to
the model. Other overlaps are only counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from tunevax.data.splits import marks, prompt_hash, user_words
from tunevax.errors import UsageError
from tunevax.lineage import Lineage
from tunevax.records import DATA, DroppedRows, Example, Prompt, read_prompts

TRAINED = ("alignment", "benign", "task", "attack")
"""The roles of data, in run.json and prompts.json, that a model is trained on."""
SOURCES = {
    "evaluation": "--eval-data", "task evaluation": "--task-eval-data", "over-refusal": "--benign-data",
    "attack": "--safety-data", "task": "--task-data",
}  # fmt: skip
"""The option that names another source for a role."""
Rows = Sequence[Example]


def _option(role: str) -> str | None:
    return "--utility-data" if role.startswith("utility") else SOURCES.get(role)


class DroppedRow(TypedDict):
    """A line of dropped.jsonl: a row that --drop-overlap left out, and the other role that has its prompt."""

    role: str
    also_in: str
    place: str | None
    prompt: Prompt
    hash: str


class Fault(NamedTuple):
    """Two roles that may not share prompts and do: the shared rows, and whether rows are left without them."""

    first: str
    second: str
    common: Sequence[Example | str]
    spare: bool


def hashes(rows: Rows) -> set[str]:
    """The hashes of the prompts of rows."""
    return {prompt_hash(row["prompt"]) for row in rows}


def chosen_with(source: str) -> set[str]:
    """Hashes of the trusted prompts that chose the rows of a curation run; none for any other source."""
    from tunevax.data.sources import parse_source

    path = Path(parse_source(source).name)
    return set(read_prompts(path.parent if path.name == DATA else path).get("validation", []))


def unrecorded(ref: str) -> list[str]:
    """The runs in a model's history that cannot be compared with: those without a record of their prompts, as of an
    earlier tunevax, with the roles; and those that no longer exist."""
    lineage = Lineage.of(ref)
    unknown = [f"{name} (gone)" for name in lineage.gone]
    for link in lineage.ancestors:
        roles = {entry.get("role") for entry in link.record.get("data") or []}
        known = read_prompts(link.folder) if roles and link.folder else {}
        if silent := [role for role in TRAINED if role in roles and role not in known]:
            unknown.append(f"{link.folder} ({', '.join(silent)})")
    return unknown


def check(
    ref: str,
    scored: Mapping[str, Rows],
    attack: Rows = (),
    benign: Mapping[str, Rows] | None = None,
    allow: bool = False,
    *,
    used: Mapping[str, Iterable[str]] | None = None,
) -> dict[str, Any]:
    """Compare the prompts that the model `ref` was trained on, an attack on it trains on, and it is scored on.

    Args:
        scored: the rows that it is scored on, by role.
        attack: the harmful rows of an attack.
        benign: the harmless rows of an attack, by role.
        allow: count, and go on.
        used: hashes that the model was trained on, where these are not all of its lineage's.

    Returns:
        For the target in run.json: `overlap`, {"alignment/attack": distinct prompts, ...}, and `unrecorded` if that is
        not empty.

    Raises:
        UsageError: a prompt that was trained on is scored on, or a harmful row of the attack was trained on before.
    """
    before = {role: set(found) for role, found in (Lineage.of(ref).prompts if used is None else used).items()}
    trains = {role: rows for role, rows in {"attack": attack, **(benign or {})}.items() if rows}
    counts: dict[str, set[str]] = {}
    faults = []

    def compare(first: str, known: set[str], second: str, rows: Rows, harms: bool, own: Rows | None = None) -> None:
        common = [row for row in rows if marks(row["prompt"]) & known]
        counts.setdefault(f"{first}/{second}", set()).update(hashes(common))
        if common and harms:
            shared = {mark for row in common for mark in marks(row["prompt"])}
            spare = any(not marks(row["prompt"]) & shared for row in (rows if own is None else own))
            faults.append(Fault(first, second, common, spare))

    for role, known in before.items():
        for other, rows in trains.items():
            compare(role, known, other, rows, other == "attack")
        for other, rows in scored.items():
            compare(role, known, other, rows, True)
    for i, (role, own) in enumerate(trains.items()):
        known = {mark for row in own for mark in marks(row["prompt"])}
        for other, rows in list(trains.items())[i + 1 :]:
            compare(role, known, other, rows, False)
        for other, rows in scored.items():
            compare(role, known, other, rows, True, own)
    if faults and not allow:
        raise _refusal(faults, ref, True)
    result: dict[str, Any] = {"overlap": {pair: len(common) for pair, common in counts.items()}}
    if silent := unrecorded(ref):
        from tunevax.console import console

        console.print(f"note: prompts of these runs are unknown and not compared: {'; '.join(silent)}", highlight=False)
        result["unrecorded"] = silent
    return result


def count(ref: str, **roles: Rows) -> dict[str, int]:
    """Distinct prompts that each two roles of a run's data share, and each role with the training data of the model
    `ref`. Nothing is refused: this is for runs that neither train nor score."""
    counts = require_disjoint(roles, allow=True)
    for role, used in Lineage.of(ref).prompts.items():
        for name, rows in roles.items():
            pair = f"{role}/{name}"
            common = hashes([row for row in rows if marks(row["prompt"]) & set(used)])
            counts[pair] = max(counts.get(pair, 0), len(common))
    return counts


def require_disjoint(roles: Mapping[str, Rows | Iterable[str]], allow: bool = False) -> dict[str, int]:
    """Count common prompts between every two roles, given as rows or as prompt hashes.

    Returns:
        `{"alignment/attack": 0, ...}`, for the run folder.

    Raises:
        UsageError: two roles share a prompt and `allow` is False.
    """
    content: dict[str, list[Example | str]] = {role: list(items) for role, items in roles.items()}
    known = {role: {h for item in items for h in _marks_of(item)} for role, items in content.items()}
    names, counts = list(content), {}
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            common = [item for item in content[second] if _marks_of(item) & known[first]]
            counts[f"{first}/{second}"] = _distinct(common)
            if common and not allow:
                if isinstance(common[0], str):  # the first role may be able to name them
                    common = [item for item in content[first] if _marks_of(item) & known[second]]
                raise _refusal([Fault(first, second, common, True)], None, False)
    return counts


def _marks_of(item: Example | str) -> set[str]:
    return {item} if isinstance(item, str) else marks(item["prompt"])


def _distinct(items: Iterable[Example | str]) -> int:
    return len({item if isinstance(item, str) else prompt_hash(item["prompt"]) for item in items})


def named(rows: Sequence[Example | str], most: int = 3) -> str:
    """The first distinct prompts of rows for a message: 'How do I ...' (FILE:LINE)."""
    distinct: dict[str, Example] = {}
    for row in rows:
        if not isinstance(row, str):
            distinct.setdefault(prompt_hash(row["prompt"]), row)
    shown = []
    for row in list(distinct.values())[:most]:
        words = " ".join(user_words(row["prompt"]).split())
        words = words if len(words) <= 60 else words[:59] + "…"
        shown.append(f"{words!r} ({row['place']})" if row.get("place") else repr(words))
    more = len(distinct) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _refusal(faults: Sequence[Fault], ref: str | None, drop: bool) -> UsageError:
    """The error for roles that share prompts; `drop`: in a verb that scores or attacks, which has --drop-overlap."""
    first, second, common, _ = faults[0]
    distinct = _distinct(common)
    text = f"{ref}: " if ref else ""
    text += f"{distinct} prompts are" if distinct > 1 else "1 prompt is"
    text += f" in both the {first} and the {second} data"
    text += f" ({named(common)})" if named(common) else ""
    for fault in faults[1:]:
        text += f", and {_distinct(fault.common)} in both the {fault.first} and the {fault.second} data"
    option = _option(second) if drop else None
    ways = ["remove them" if option is None else f"give other rows with {option}"]
    if second == "task evaluation" and first == "task":
        ways.append("train on TASK:split=train alone")
    if drop and all(fault.spare for fault in faults):
        ways.append("pass --drop-overlap to go on without them")
    ways.append("pass --allow-overlap to go on and record it")
    return UsageError(f"{text}, so the evidence would be invalid; {', or '.join(ways)}")


@dataclass
class Exclusion:
    """The rows that `--drop-overlap` leaves out, the same for every model that is compared.

    Training cannot be undone, so the training prompts of a model are left out of scoring, and the scored prompts out of
    the attack. An attack's harmful rows also exclude the models' training prompts.

    Attributes:
        active: whether anything is left out.
        trained: by role, hashes of the training prompts of all models.
        scored: hashes of the prompts that are scored on.
        dropped: the rows left out so far.
    """

    active: bool = False
    trained: dict[str, set[str]] = field(default_factory=dict)
    scored: set[str] = field(default_factory=set)
    dropped: list[DroppedRow] = field(default_factory=list)

    @classmethod
    def of(cls, used: Iterable[Mapping[str, Iterable[str]]], active: bool) -> Exclusion:
        """Before any rows are read, for models that were trained on these prompts."""
        exclusion = cls(active)
        for prompts in used if active else ():
            for role, more in prompts.items():
                exclusion.trained.setdefault(role, set()).update(more)
        return exclusion

    def fresh(self) -> Exclusion:
        """The same exclusion with an empty list of dropped rows."""
        return Exclusion(self.active, self.trained, self.scored)

    def score(self, role: str, rows: list[Example]) -> list[Example]:
        """Rows to score on, without training prompts."""
        return self._without(role, rows, self.trained)

    def settle(self, scored: Mapping[str, Rows]) -> None:
        """Record the scored prompts, before the attack's rows are read."""
        if self.active:
            self.scored = {mark for rows in scored.values() for row in rows for mark in marks(row["prompt"])}

    def attack(self, role: str, rows: list[Example]) -> list[Example]:
        """Harmful rows to train on, without scored and training prompts."""
        return self._without(role, rows, {**self.trained, "evaluation": self.scored})

    def benign(self, role: str, rows: list[Example]) -> list[Example]:
        """Harmless rows to train on, without scored prompts."""
        return self._without(role, rows, {"evaluation": self.scored})

    def _without(self, role: str, rows: list[Example], known: Mapping[str, set[str]]) -> list[Example]:
        if not self.active:
            return rows
        kept = []
        for row in rows:
            other = next((name for name, found in known.items() if marks(row["prompt"]) & found), None)
            if other is None:
                kept.append(row)
                continue
            self.dropped.append(
                {"role": role, "also_in": other, "place": row.get("place"), "prompt": row["prompt"],
                 "hash": prompt_hash(row["prompt"])}
            )  # fmt: skip
        if rows and not kept:
            way = _option(role)
            raise UsageError(
                f"--drop-overlap would leave no {role} row: each of the {len(rows)} is in the data that the model or "
                f"the attack trains or is scored on ({named(rows)}); give other rows{f' with {way}' if way else ''}"
            )
        return kept

    def summary(self) -> dict[str, DroppedRows] | None:
        """For run.json: by role, the rows left out and the hashes of their prompts; None if inactive."""
        if not self.active:
            return None
        left_out: dict[str, list[str]] = {}
        for row in self.dropped:
            left_out.setdefault(row["role"], []).append(row["hash"])
        return {role: {"rows": len(prompts), "prompts": sorted(set(prompts))} for role, prompts in left_out.items()}
