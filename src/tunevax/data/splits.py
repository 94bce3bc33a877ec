"""Splits by prompt: a prompt's hash decides its split, so that no file order or sampling can leak one into another."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from tunevax.errors import UsageError

SHARES = {"alignment": 0.5, "attack": 0.25, "evaluation": 0.25}
"""Share of the hash range that belongs to each split of a safety dataset."""

HELD_OUT = "held-out"
"""The split of rows that their `split` field puts there, and in no other; no hash ever does."""

HELD_OUT_HALVES = {"held-out-attack": 0.5, "held-out-evaluation": 0.5}
"""The held-out rows in two halves by prompt hash."""


def prompt_text(prompt: str | Sequence[dict[str, str]]) -> str:
    """A prompt as one string: itself, or its messages, one per line."""
    return prompt if isinstance(prompt, str) else "\n".join(m["content"] for m in prompt)


def normalise(text: str) -> str:
    """Case, width, white space and closing punctuation removed: what makes two prompts the same prompt."""
    text = re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text).casefold()).strip()
    return text.rstrip(" .?!") or text


def prompt_hash(prompt: str | Sequence[dict[str, str]]) -> str:
    """16 hexadecimal digits of the SHA-256 of the normalised prompt."""
    return hashlib.sha256(normalise(prompt_text(prompt)).encode()).hexdigest()[:16]


def split_of(prompt: str | Sequence[dict[str, str]], shares: dict[str, float] = SHARES) -> str:
    """The split a prompt belongs to, by its hash."""
    position, edge = int(prompt_hash(prompt), 16) / 16**16, 0.0
    for name, share in shares.items():
        edge += share
        if position < edge:
            return name
    return name


def take_split(rows: list[dict[str, Any]], split: str, shares: dict[str, float] = SHARES) -> list[dict[str, Any]]:
    """The rows of one split: those whose own `split` field says so, or whose hash does; `all` takes every row.

    Raises:
        UsageError: an unknown split.
    """
    if split == "all":
        return rows
    if split in HELD_OUT_HALVES:
        held = take_split(rows, HELD_OUT, shares)
        return [row for row in held if split_of(row["prompt"], HELD_OUT_HALVES) == split]
    if split not in (*shares, HELD_OUT):
        raise UsageError(f"split is {split!r}; known: {', '.join([*shares, HELD_OUT, *HELD_OUT_HALVES])}, all")
    return [row for row in rows if (row.get("split") or split_of(row["prompt"], shares)) == split]


def drawn(rows: Sequence[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    """At most `limit` of these rows, in the order of the file: of each `category` its share.

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
    """`seats`, fewer than there are rows, parted in proportion to `sizes` by largest remainder. Nobody goes without one
    where there are as many seats as names. Ties go by a hash of the name, not by the alphabet."""
    open_to = sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest())
    shares, small = {}, [] if seats < len(sizes) else open_to
    while small:  # a share below 1 becomes 1, and the others part the rest
        small = [name for name in open_to if seats * sizes[name] < sum(sizes[n] for n in open_to)]
        shares |= dict.fromkeys(small, 1)
        open_to = [name for name in open_to if name not in small]
        seats -= len(small)
    total = sum(sizes[name] for name in open_to)
    parts = {name: divmod(seats * sizes[name], total) for name in open_to}
    rest = seats - sum(whole for whole, _ in parts.values())
    rounded_up = sorted(open_to, key=lambda name: -parts[name][1])[:rest]
    return shares | {name: whole + (name in rounded_up) for name, (whole, _) in parts.items()}


def overlap(first: Iterable[str], second: Iterable[str]) -> int:
    """How many distinct prompt hashes the two have in common."""
    return len(set(first) & set(second))


def require_disjoint(roles: dict[str, Iterable[str]], allow: bool = False) -> dict[str, int]:
    """Count common prompts between every two roles, given as prompt hashes.

    Returns:
        `{"alignment/attack": 0, ...}`, for the run folder.

    Raises:
        UsageError: two roles share a prompt and `allow` is False.
    """
    names, counts = list(roles), {}
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            counts[f"{first}/{second}"] = count = overlap(roles[first], roles[second])
            if count and not allow:
                raise UsageError(
                    f"{count} prompts are in both the {first} and the {second} data, so the evidence would be worth "
                    "nothing; remove them, or pass --allow-overlap to go on and have it recorded"
                )
    return counts
