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
from itertools import combinations
from pathlib import Path
from typing import Any, TypedDict

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
    """A line of dropped.jsonl: a row that --drop-overlap left out."""

    role: str
    also_in: str  # the other role that has its prompt
    place: str | None
    prompt: Prompt
    hash: str


Fault = tuple[str, str, Sequence[Example | str], bool]
"""Two roles that may not share prompts and do, the shared rows, and whether rows are left without them."""


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
    ref: str, scored: Mapping[str, Rows], attack: Rows = (), benign: Mapping[str, Rows] | None = None,
    allow: bool = False, *, used: Mapping[str, Iterable[str]] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Compare the prompts that the model `ref` was trained on, an attack on it trains on, and it is scored on. Raises
    `UsageError` if a prompt that was trained on is scored on, or a harmful row of the attack was trained on before.

    Args:
        scored: the rows that it is scored on, by role.
        attack: the harmful rows of an attack; `benign` are its harmless rows, by role.
        allow: count, and go on.
        used: hashes that the model was trained on, where these are not all of its lineage's.

    Returns:
        For the target in run.json: `overlap`, {"alignment/attack": distinct prompts, ...}, and `unrecorded` if that is
        not empty.
    """
    before = {role: set(found) for role, found in (Lineage.of(ref).prompts if used is None else used).items()}
    trains = {role: rows for role, rows in {"attack": attack, **(benign or {})}.items() if rows}
    counts: dict[str, set[str]] = {}
    faults: list[Fault] = []
    pairs: list[tuple[str, set[str], Rows, tuple[str, Rows]]] = []
    for role, prompts in before.items():
        pairs += [(role, prompts, (), other) for other in (*trains.items(), *scored.items())]
    for i, (role, own) in enumerate(trains.items()):
        known = {mark for row in own for mark in marks(row["prompt"])}
        pairs += [(role, known, own, other) for other in (*list(trains.items())[i + 1 :], *scored.items())]
    for first, known, own, (second, rows) in pairs:
        common = [row for row in rows if marks(row["prompt"]) & known]
        counts.setdefault(f"{first}/{second}", set()).update(hashes(common))
        if common and (second == "attack" or second in scored):
            shared = {mark for row in common for mark in marks(row["prompt"])}
            faults.append((first, second, common, any(not marks(row["prompt"]) & shared for row in own or rows)))
    if faults and not allow:
        raise _refusal(faults, ref)
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
            common = hashes([row for row in rows if marks(row["prompt"]) & set(used)])
            counts[f"{role}/{name}"] = max(counts.get(f"{role}/{name}", 0), len(common))
    return counts


def require_disjoint(roles: Mapping[str, Rows | Iterable[str]], allow: bool = False) -> dict[str, int]:
    """The number of common prompts between every two roles, given as rows or as prompt hashes, `{"alignment/attack":
    0, ...}`. Raises `UsageError` if two roles share a prompt and `allow` is False."""
    content: dict[str, list[Example | str]] = {role: list(items) for role, items in roles.items()}
    known = {role: {h for item in items for h in _marks_of(item)} for role, items in content.items()}
    counts = {}
    for first, second in combinations(content, 2):
        common = [item for item in content[second] if _marks_of(item) & known[first]]
        counts[f"{first}/{second}"] = _distinct(common)
        if common and not allow:
            if isinstance(common[0], str):  # the first role may be able to name them
                common = [item for item in content[first] if _marks_of(item) & known[second]]
            raise _refusal([(first, second, common, True)])
    return counts


def _marks_of(item: Example | str) -> set[str]:
    return {item} if isinstance(item, str) else marks(item["prompt"])


def _distinct(items: Iterable[Example | str]) -> int:
    return len({item if isinstance(item, str) else prompt_hash(item["prompt"]) for item in items})


def named(rows: Sequence[Example | str]) -> str:
    """The first three distinct prompts of rows for a message: 'How do I ...' (FILE:LINE)."""
    distinct: dict[str, Example] = {}
    for row in rows:
        if not isinstance(row, str):
            distinct.setdefault(prompt_hash(row["prompt"]), row)
    shown = []
    for row in list(distinct.values())[:3]:
        words = " ".join(user_words(row["prompt"]).split())
        words = words if len(words) <= 60 else words[:59] + "…"
        shown.append(f"{words!r} ({row['place']})" if row.get("place") else repr(words))
    more = len(distinct) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _refusal(faults: Sequence[Fault], ref: str = "") -> UsageError:
    """The error for roles that share prompts; `ref` in a verb that scores or attacks, which has --drop-overlap."""
    first, second, common, _ = faults[0]
    distinct, examples = _distinct(common), named(common)
    text = (f"{ref}: " if ref else "") + (f"{distinct} prompts are" if distinct > 1 else "1 prompt is")
    text += f" in both the {first} and the {second} data" + (f" ({examples})" if examples else "")
    for one, other, both, _ in faults[1:]:
        text += f", and {_distinct(both)} in both the {one} and the {other} data"
    option = _option(second) if ref else None
    ways = ["remove them" if option is None else f"give other rows with {option}"]
    if second == "task evaluation" and first == "task":
        ways.append("train on TASK:split=train alone")
    if ref and all(spare for *_, spare in faults):
        ways.append("pass --drop-overlap to go on without them")
    ways.append("pass --allow-overlap to go on and record it")
    return UsageError(f"{text}, so the evidence would be invalid; {', or '.join(ways)}")


@dataclass
class Exclusion:
    """The rows that `--drop-overlap` leaves out, the same for every model that is compared.

    Training cannot be undone, so the training prompts of a model are left out of scoring, and the scored prompts out of
    the attack. An attack's harmful rows also exclude the models' training prompts.
    """

    active: bool = False  # whether anything is left out
    trained: dict[str, set[str]] = field(default_factory=dict)  # by role, hashes of the models' training prompts
    scored: set[str] = field(default_factory=set)  # hashes of the prompts that are scored on
    dropped: list[DroppedRow] = field(default_factory=list)  # the rows left out so far

    @classmethod
    def of(cls, used: Iterable[Mapping[str, Iterable[str]]], active: bool) -> Exclusion:
        """Before any rows are read, for models that were trained on these prompts."""
        trained: dict[str, set[str]] = {}
        for role, more in (item for prompts in used if active for item in prompts.items()):
            trained.setdefault(role, set()).update(more)
        return cls(active, trained)

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
            prompt = row["prompt"]
            other = next((name for name, found in known.items() if marks(prompt) & found), None)
            if other is None:
                kept.append(row)
            else:
                place, own = row.get("place"), prompt_hash(prompt)
                self.dropped.append({"role": role, "also_in": other, "place": place, "prompt": prompt, "hash": own})
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
