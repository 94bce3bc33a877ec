"""Numbers and lists of names as words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

TINY = 1e-9  # shares are counts divided: a difference of less is rounding


def percent(value: float) -> str:
    """'98 %'."""
    return f"{100 * value:.0f} %"


def number(value: float) -> str:
    """A ratio with two digits or so; never 1.0 for what is not 1."""
    if math.isinf(value):
        return "∞"
    if value >= 9.95:
        return f"{value:,.0f}"
    text = f"{value:.1f}" if value >= 0.95 else f"{value:.2g}"
    return f"{value:.2f}" if text == "1.0" and abs(value - 1) > TINY else text


def level(phi: float) -> str:
    """'50 %', or '12.5 %'."""
    return f"{100 * phi:g} %"


def counted(count: int, word: str) -> str:
    """'1 seed', '3 seeds'."""
    return f"{count:,} {word}" + ("" if count == 1 else "s")


def some(names: Sequence[str], between: str = ", ", most: int = 8) -> str:
    """The names, or the first of many and the number of the others."""
    return between.join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def step_text(step: int | None, last: int) -> str:
    """'32', or 'never within 120'."""
    return f"never within {last:,}" if step is None else f"{step:,}"


def joined(words: Iterable[str]) -> str:
    """'a, b and c'."""
    words = list(words)
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
