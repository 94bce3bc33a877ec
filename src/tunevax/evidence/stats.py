"""Intervals of shares of prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence


def proportion(count: int, total: int) -> dict[str, float | int]:
    """A share with its 95 % Wilson interval, which holds at 0 and 1 too."""
    from scipy.stats import binomtest

    interval = binomtest(count, total).proportion_ci(0.95, method="wilson")
    return {"value": count / total, "n": total, "low": round(interval.low, 6), "high": round(interval.high, 6)}


def paired_difference(pairs: Sequence[tuple[bool, bool]]) -> dict[str, float | int]:
    """How much more often the first of each pair is true than the second, from -1 to 1, with Newcombe's 95 % interval
    for shares of the same sample (Statistics in Medicine 17, 1998, 2635-2650, method 10): from the Wilson intervals of
    the two shares and the correlation phi between them, corrected for continuity."""
    n = len(pairs)
    both, first, second, neither = (
        pairs.count(kind) for kind in ((True, True), (True, False), (False, True), (False, False))
    )
    p, q = proportion(both + first, n), proportion(both + second, n)
    product = (both + first) * (second + neither) * (both + second) * (first + neither)
    surplus = both * neither - first * second
    phi = (max(surplus - n / 2, 0) if surplus > 0 else surplus) / math.sqrt(product) if product else 0.0

    def reach(d: float, e: float) -> float:
        return math.sqrt(max(d * d - 2 * phi * d * e + e * e, 0.0))

    value = p["value"] - q["value"]
    low = value - reach(p["value"] - p["low"], q["high"] - q["value"])
    high = value + reach(p["high"] - p["value"], q["value"] - q["low"])
    return {"value": value, "n": n, "low": round(low, 6), "high": round(high, 6)}
