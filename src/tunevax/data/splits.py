"""Splits by prompt: a prompt's hash decides its split, so that no file order or sampling can leak one into another."""

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

HELD_OUT = "held-out"
"""The split of rows that their `split` field puts there, and in no other; no hash ever does."""

HELD_OUT_HALVES = {"held-out-attack": 0.5, "held-out-evaluation": 0.5}
"""The held-out rows in two halves by prompt hash."""

TRAINING = "train"
"""What published datasets call the rows to train on. Of a safety dataset these are two splits, alignment and attack."""

VALIDATION = "validation"
"""Rows that say so themselves, as some of the organism's do; no hash puts a prompt there."""

SPELLINGS = {
    "train": TRAINING, "training": TRAINING,
    "test": "evaluation", "testing": "evaluation", "eval": "evaluation",
    "validation": VALIDATION, "val": VALIDATION, "valid": VALIDATION, "dev": VALIDATION,
}  # fmt: skip
"""Other words for a split, in a row's `split` field or in the `split` option of a source."""


def prompt_text(prompt: Prompt) -> str:
    """A prompt as one string: itself, or its messages, one per line."""
    return prompt if isinstance(prompt, str) else "\n".join(m["content"] for m in prompt)


def normalise(text: str) -> str:
    """Case, width, white space and closing punctuation removed: what makes two prompts the same prompt."""
    text = re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text).casefold()).strip()
    return text.rstrip(" .?!") or text


def user_words(prompt: Prompt) -> str:
    """What the user says in a prompt: the text itself, or the user's turns, one per line. Neither a system message nor
    the assistant's earlier turns make another question of it. Messages without a user turn count whole."""
    if isinstance(prompt, str):
        return prompt
    return prompt_text([m for m in prompt if m["role"] == "user"] or prompt)


def prompt_hash(prompt: Prompt) -> str:
    """16 hexadecimal digits of the SHA-256 of the user's words, normalised."""
    return _digest(user_words(prompt))


def marks(prompt: Prompt) -> set[str]:
    """The hashes under which a run may have recorded a prompt: `prompt_hash`, and the hash of the whole text, by which
    earlier versions knew a prompt with a system message or with earlier answers."""
    return {_digest(user_words(prompt)), _digest(prompt_text(prompt))}


def _digest(text: str) -> str:
    return hashlib.sha256(normalise(text).encode()).hexdigest()[:16]


def split_of(prompt: Prompt, shares: dict[str, float] = SHARES) -> str:
    """The split a prompt belongs to, by its hash."""
    position, edge = int(prompt_hash(prompt), 16) / 16**16, 0.0
    for name, share in shares.items():
        edge += share
        if position < edge:
            return name
    return name


def split_word(word: object) -> str | None:
    """A split as tunevax calls it, from a row or an option; None for an empty field. A word that is not known is
    returned as it stands."""
    if word is None or not str(word).strip():
        return None
    name = str(word).strip()
    return SPELLINGS.get(name.casefold(), name)


def splits_of(rows: Sequence[Example], shares: dict[str, float] = SHARES) -> list[str]:
    """The split of each row: its `split` field, else its hash.

    Rows for training that do not say which of several training splits they are in are divided among these by hash, in
    the same proportions. A task's validation rows are for evaluation where no others are, and apart where some are.
    """
    words = [split_word(row.get("split")) for row in rows]
    if TRAINING in shares and "evaluation" not in words:
        words = ["evaluation" if word == VALIDATION else word for word in words]
    training = {k: v for k, v in shares.items() if k != "evaluation"}
    training = {k: v / sum(training.values()) for k, v in training.items()}
    found = []
    for row, word in zip(rows, words, strict=True):
        if word == TRAINING or word is None:
            word = split_of(row["prompt"], shares if word is None else training)
        found.append(word)
    return found


def take_split(rows: list[Example], split: str, shares: dict[str, float] = SHARES) -> list[Example]:
    """The rows of one split: those whose own `split` field says so, or whose hash does; `all` takes every row.

    Raises:
        UsageError: an unknown split, wanted or in a row.
    """
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
                "train and test); write one of these, or leave the field out to have the prompt decide"
            )
    if split == VALIDATION and TRAINING in shares and VALIDATION not in splits:
        split = "evaluation"
    return [row for row, name in zip(rows, splits, strict=True) if name == split]


def no_rows(name: str, split: str, rows: Sequence[Example], shares: dict[str, float] = SHARES) -> UsageError:
    """The error for a source without a row in the split that is wanted of it: what is in the other splits, and how to
    take these without training and scoring on the same prompts."""
    there = Counter(splits_of(rows, shares))
    parts = ", ".join(f"{count} in {part}" for part, count in sorted(there.items()))
    by = "`split` field" if any(split_word(row.get("split")) for row in rows) else "prompts' hashes"
    one = f"its {len(rows)} rows are" if len(rows) > 1 else "its one row is"
    if split == "evaluation":
        option = "--task-eval-data" if TRAINING in shares else "--eval-data"
        way = f"give rows to score on in a file of their own, with {option} FILE:split=all"
    else:
        everything = f"{name}{',' if ':path=' in name else ':'}split=all"
        way = f"{everything} takes every row, and the prompts to score on must then be from another file"
    return UsageError(f"{name} has no row in the {split} split: by the {by} {one} {parts}; {way}")


def drawn(rows: Sequence[Example], limit: int) -> list[Example]:
    """At most `limit` of these rows, in the order of the file: of each `category` its share.

    The share is exact to within one row, for a category and for all that stand together by name, as those do whose
    first of several labels is the same: of many small categories some get one row and others none, so that together
    they have their share too. None is given a row only to be there, since the rows that are drawn stand for all.
    Within a category the prompt's hash decides, so that a file sorted by anything gives the rows that a shuffled one
    gives. A prompt comes twice only when no other is left.
    """
    if limit >= len(rows):
        return list(rows)
    places: dict[str, list[tuple[int, str, int]]] = {}
    seen: Counter[str] = Counter()
    for place, row in enumerate(rows):
        own = prompt_hash(row["prompt"])
        places.setdefault(str(row.get("category")), []).append((seen[own], own, place))
        seen[own] += 1
    shares = _shares({category: len(found) for category, found in places.items()}, limit)
    return [rows[i] for i in sorted(place for c, n in shares.items() for *_, place in sorted(places[c])[:n])]


def _shares(sizes: dict[str, int], seats: int) -> dict[str, int]:
    """`seats`, fewer than there are rows, parted in proportion to `sizes`: each name gets what the running total of the
    shares, rounded, goes up by, in alphabetical order."""
    total, before, shares = sum(sizes.values()), 0, {}
    for name in sorted(sizes):
        after = before + sizes[name]
        shares[name] = _rounded(seats * after, total) - _rounded(seats * before, total)
        before = after
    return shares


def _rounded(number: int, by: int) -> int:
    """A quotient to the nearest whole number, a half up."""
    return (2 * number + by) // (2 * by)
