"""Splits by prompt: a prompt's hash decides its split, so neither file order nor sampling leaks one into another."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from tunevax.errors import UsageError
from tunevax.records import Example, Prompt

SHARES = {"alignment": 0.5, "attack": 0.25, "evaluation": 0.25}
"""Share of the hash range that belongs to each split of a safety dataset."""
HELD_OUT, VALIDATION = "held-out", "validation"
"""Splits of rows whose `split` field names them; no hash does."""
HELD_OUT_HALVES = {"held-out-attack": 0.5, "held-out-evaluation": 0.5}
"""The held-out rows in two halves by prompt hash."""
TRAINING = "train"
"""The training rows of published datasets. Of a safety dataset these are two splits, alignment and attack."""
SPELLINGS = {
    **dict.fromkeys(("train", "training"), TRAINING), **dict.fromkeys(("test", "testing", "eval"), "evaluation"),
    **dict.fromkeys(("validation", "val", "valid", "dev"), VALIDATION),
}  # fmt: skip
"""Other words for a split, in a row's `split` field or in the `split` option of a source."""


def prompt_text(prompt: Prompt) -> str:
    """A prompt as one string: itself, or its messages, one per line."""
    return prompt if isinstance(prompt, str) else "\n".join(m["content"] for m in prompt)


def normalise(text: str) -> str:
    """A prompt without case, width, white space and closing punctuation, in which equal prompts may differ."""
    text = re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text).casefold()).strip()
    return text.rstrip(" .?!") or text


def user_words(prompt: Prompt) -> str:
    """The user's part of a prompt, which identifies it: the text itself, or the user's turns, one per line; all
    messages where none is the user's."""
    if isinstance(prompt, str):
        return prompt
    return prompt_text([m for m in prompt if m["role"] == "user"] or prompt)


def prompt_hash(prompt: Prompt) -> str:
    """16 hexadecimal digits of the SHA-256 of the user's words, normalised."""
    return hashlib.sha256(normalise(user_words(prompt)).encode()).hexdigest()[:16]


def marks(prompt: Prompt) -> set[str]:
    """The hashes under which a run may have recorded a prompt: `prompt_hash`, and the hash of the whole text, which
    earlier versions recorded."""
    return {prompt_hash(prompt), prompt_hash(prompt_text(prompt))}


def split_of(prompt: Prompt, shares: dict[str, float] = SHARES) -> str:
    """The split a prompt belongs to, by its hash."""
    position, edge = int(prompt_hash(prompt), 16) / 16**16, 0.0
    for name, share in shares.items():
        edge += share
        if position < edge:
            return name
    return name


def split_word(word: object) -> str | None:
    """A split as tunevax calls it, from a row or an option; None for an empty field, an unknown word unchanged."""
    name = "" if word is None else str(word).strip()
    return SPELLINGS.get(name.casefold(), name) or None


def splits_of(rows: Sequence[Example], shares: dict[str, float] = SHARES) -> list[str]:
    """The split of each row: its `split` field, else its hash.

    Rows for training are divided among several training splits by hash, in the same proportions. A task's validation
    rows are for evaluation if it has no other rows for that.
    """
    words = [split_word(row.get("split")) for row in rows]
    if TRAINING in shares and "evaluation" not in words:
        words = ["evaluation" if word == VALIDATION else word for word in words]
    training = {k: v for k, v in shares.items() if k != "evaluation"}
    training = {k: v / sum(training.values()) for k, v in training.items()}
    by_hash = {None: shares, TRAINING: training}
    return [
        split_of(row["prompt"], by_hash[word]) if word is None or word == TRAINING else word
        for row, word in zip(rows, words, strict=True)
    ]


def take_split(rows: list[Example], split: str, shares: dict[str, float] = SHARES) -> list[Example]:
    """The rows of one split: those whose own `split` field says so, or whose hash does; `all` takes every row. Raises
    `UsageError` for an unknown split, wanted or in a row."""
    if split == "all":
        return rows
    split = split_word(split) or split
    if split in HELD_OUT_HALVES:
        held = take_split(rows, HELD_OUT, shares)
        return [row for row in held if split_of(row["prompt"], HELD_OUT_HALVES) == split]
    known = [*shares, HELD_OUT, VALIDATION]
    if split not in known:
        raise UsageError(f"split is {split!r}; known: {', '.join([*known, *HELD_OUT_HALVES])}, all")
    splits = splits_of(rows, shares)
    for row, name in zip(rows, splits, strict=True):
        if name not in (*known, *HELD_OUT_HALVES):
            raise UsageError(
                f"{row.get('place') or 'a row'}: field 'split' is {row['split']!a}; known: {', '.join(known)} (also "
                "train and test); write one of these, or leave the field out to split by the prompt's hash"
            )
    if split == VALIDATION and TRAINING in shares and VALIDATION not in splits:
        split = "evaluation"
    return [row for row, name in zip(rows, splits, strict=True) if name == split]


def required_split(name: str, rows: list[Example], split: str, shares: dict[str, float] = SHARES) -> list[Example]:
    """`take_split` of the source `name`. If that is empty, a `UsageError` names the rows of the other splits, and how
    to take these without training and scoring on the same prompts."""
    if not rows:
        raise UsageError(f"{name} has no rows")
    if taken := take_split(rows, split, shares):
        return taken
    if split.startswith(HELD_OUT) and TRAINING not in shares:
        way = f"hold categories out with {name}:held_out=CATEGORY+CATEGORY"
        raise UsageError(f"{name} has no row in the {split} split; {way}")
    parts = ", ".join(f"{count} in {part}" for part, count in sorted(Counter(splits_of(rows, shares)).items()))
    by = "`split` field" if any(split_word(row.get("split")) for row in rows) else "prompts' hashes"
    one = f"its {len(rows)} rows are" if len(rows) > 1 else "its one row is"
    way = (
        f"{name}{',' if ':path=' in name else ':'}split=all takes every row, and the prompts to score on must then be "
    )
    way += "from another file"
    if split == "evaluation":
        option = "--task-eval-data" if TRAINING in shares else "--eval-data"
        way = f"give rows to score on in a file of their own, with {option} FILE:split=all"
    raise UsageError(f"{name} has no row in the {split} split: by the {by} {one} {parts}; {way}")


def drawn(rows: Sequence[Example], limit: int) -> list[Example]:
    """At most `limit` of these rows, in the order of the file: of each `category` its share.

    The share is exact to within one row, also for neighbouring categories together, such as those whose first of
    several labels is the same: of many small categories some get one row and others none. Within a category the
    prompt's hash decides, so the order of the file does not matter. A prompt occurs twice only if no other is left.
    """
    if limit >= len(rows):
        return list(rows)
    places: dict[str, list[tuple[int, str, int]]] = {}
    seen: Counter[str] = Counter()
    for place, row in enumerate(rows):
        own = prompt_hash(row["prompt"])
        places.setdefault(str(row.get("category")), []).append((seen[own], own, place))
        seen[own] += 1
    taken, total = list[int](), 0
    for category in sorted(places):  # each gets the increase of the running total's share, rounded, a half up
        total += len(places[category])
        share = (2 * limit * total + len(rows)) // (2 * len(rows))
        taken += [place for *_, place in sorted(places[category])[: share - len(taken)]]
    return [rows[i] for i in sorted(taken)]
