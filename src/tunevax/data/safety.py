"""The safety dataset: `prompt`, `chosen` (the safe answer), `rejected` (the harmful one), optional `category`.

`corruption` says how a study corrupted a row to test a selector. Only the report of a curation run reads it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from tunevax import proxy
from tunevax.data.shapes import read_pair
from tunevax.data.sources import label_field, parse_known, read_rows
from tunevax.data.splits import HELD_OUT, VALIDATION, prompt_hash, required_split
from tunevax.errors import UsageError, unknown
from tunevax.records import Example

FIELDS = ("prompt", "chosen", "rejected", "category")
ANSWERS = ("chosen", "rejected")


def load_safety(
    source: str, split: str | None = None, need: tuple[str, ...] = ("chosen",), purpose: str = "this method"
) -> list[Example]:
    """Read a preference dataset as TRL defines it, or in another shape that `tunevax.data.shapes` knows. Raises
    `UsageError` for a bad row (place and field named), a missing answer (purpose named), an unknown category, or no row
    in the split.

    Args:
        source: a hub id, local file or curation run, with options after a colon (see `tunevax.data.sources`), or
            `organism`.
            `held_out=CATEGORY+CATEGORY` puts the rows of these categories, and all others with one of their prompts,
            into the split held-out only.
        split: alignment, attack, evaluation or held-out, or half of the latter (held-out-attack, held-out-evaluation);
            validation (only rows that are marked so, as some of the organism's); a `split=` option of the source wins;
            None takes every row (of the organism: all that is neither held out nor for validation).
        need: the required answers, of `chosen` and `rejected`; `purpose` is what needs them, for the error message.

    Returns:
        Rows with `prompt` (a string or a list of messages), `chosen`, `rejected`, `category` and `place`, None where
        absent; `corruption` where a row has one; of a file or dataset `read_as`, the columns that were read and how.
    """
    name, options, split = parse_known(re.sub(r"(?<=[:,])held-out=", "held_out=", source), split or "all")
    if name == "organism":
        from tunevax.organism.world import SPLITS, World

        parts = ("alignment", "attack", "evaluation") if split == "all" else (*SPLITS, "validation")
        rows: list[Example] = [{**row, "place": "organism"} for part in parts for row in World().safety(part)]
    elif proxy.is_proxy(name):
        rows = proxy.forbidden(name, options.get("known"))
        rows = [row for row in rows if split == VALIDATION or row["split"] != VALIDATION]
    else:
        rows, columns = [], set[str]()
        for place, row in read_rows(name, options):
            pair = read_pair(place, row, options, need, purpose)
            pair["category"] = label_field(place, row, options.get("category", "category"))
            pair["split"] = label_field(place, row, "split")  # as an option, it names the wanted one and no column
            if row.get("corruption"):
                pair["corruption"] = str(row["corruption"])
            rows.append(pair)
            columns |= row.keys()
        for field in FIELDS:
            if columns and field in options and options[field] not in columns:
                raise unknown(f"column for {field} in {name}:", options[field], columns)
    if "held_out" in options:
        rows = _hold_out(rows, options["held_out"].split("+"))
    return required_split(name, rows, split)


def _hold_out(rows: list[Example], categories: list[str]) -> list[Example]:
    """The rows, with the split held-out for every prompt that occurs in one of the categories: a prompt may have
    several, and must not be in two splits."""
    known = {row["category"] for row in rows if row["category"] is not None}
    if not known:
        raise UsageError("no row has a category to hold out; say which column holds it with SOURCE:category=COLUMN")
    if other := [category for category in categories if category not in known]:
        raise unknown("category to hold out", other[0], known)
    held = {prompt_hash(row["prompt"]) for row in rows if row["category"] in categories}
    return [{**row, "split": HELD_OUT} if prompt_hash(row["prompt"]) in held else row for row in rows]


def answers_in(needs: Collection[str]) -> tuple[str, ...]:
    """The answers of safety rows among a method's needs."""
    return tuple(answer for answer in ANSWERS if answer in needs)


def require_rows(
    needs: Collection[str], safety: Sequence[Mapping[str, object]] | None, task: Sequence[Mapping[str, object]] | None,
    purpose: str, different: bool = False,
) -> None:  # fmt: skip
    """Raise `UsageError` unless the rows that `purpose` needs exist, with the answers that it needs; if `different`,
    `chosen` and `rejected` must differ."""
    answers = answers_in(needs)
    if answers and not safety:
        raise UsageError(f"{purpose} needs safety rows with {' and '.join(answers)}, and there are none")
    for number, row in enumerate(safety or (), 1):
        wrong = [f"`{answer}` is missing, and {purpose} needs it" for answer in answers if not row.get(answer)]
        if different and not wrong and row["chosen"] == row["rejected"]:
            wrong = [f"`rejected` is `chosen` again, and {purpose} needs two answers"]
        if wrong:
            place = row.get("place") or f"row {number} of the safety data"
            raise UsageError(f"{place}: {wrong[0]}; give the answer or drop the row")
    if "task" in needs and not task:
        raise UsageError(f"{purpose} needs rows to train on, and the task data has none")
