"""Intervals of shares of prompts, and a correction for many tests."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tunevax.records import Score


def proportion(count: int, total: int) -> Score:
    """A share with its 95 % Wilson interval, which holds at 0 and 1 too."""
    low, high = wilson(count / total, total)
    return {"value": count / total, "n": total, "low": round(low, 6), "high": round(high, 6)}


def mean_score(values: Sequence[float]) -> Score:
    """The mean of a sample with its 95 % t interval; of a single value, without one."""
    import numpy as np
    from scipy import stats

    mean = float(np.mean(values))
    half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)) if len(values) > 1 else None
    ends = (None, None) if half is None else (mean - half, mean + half)
    return {"value": mean, "n": len(values), "low": ends[0], "high": ends[1]}


def wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of n. share * n need not be whole: the share may be a mean over seeds."""
    from scipy.special import ndtri

    z = float(ndtri(0.975))
    half = z * math.sqrt(share * (1 - share) / n + (z / n) ** 2 / 4)
    centre = share + z * z / n / 2
    return max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))


def newcombe(p: float, n: int, q: float, m: int) -> tuple[float, float]:
    """The 95 % interval of p - q, of two independent shares of n and of m, from the Wilson intervals of the two
    (Newcombe, Statistics in Medicine 17, 1998, 873-890, method 10)."""
    (low, high), (least, most) = wilson(p, n), wilson(q, m)
    return p - q - math.hypot(p - low, most - q), p - q + math.hypot(high - p, q - least)


def holm(ps: Sequence[float]) -> list[float]:
    """P values corrected for their number by Holm's step-down, in the order given."""
    corrected, least = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        least = corrected[i] = min(max(least, (len(ps) - rank) * ps[i]), 1.0)
    return corrected


def paired_difference(pairs: Sequence[tuple[bool, bool]]) -> Score:
    """How much more often the first of each pair is true than the second, from -1 to 1, with Newcombe's 95 % interval
    for shares of the same sample (Statistics in Medicine 17, 1998, 2635-2650, method 10): from the Wilson intervals of
    the two shares and the correlation phi between them, corrected for continuity."""
    n = len(pairs)
    both, first, second = pairs.count((True, True)), pairs.count((True, False)), pairs.count((False, True))
    neither = n - both - first - second
    p, q = (both + first) / n, (both + second) / n
    (p_low, p_high), (q_low, q_high) = ((round(low, 6), round(high, 6)) for low, high in (wilson(p, n), wilson(q, n)))
    product = (both + first) * (second + neither) * (both + second) * (first + neither)
    surplus = both * neither - first * second
    phi = (max(surplus - n / 2, 0) if surplus > 0 else surplus) / math.sqrt(product) if product else 0.0

    def reach(d: float, e: float) -> float:
        return math.sqrt(max(d * d - 2 * phi * d * e + e * e, 0.0))

    low = p - q - reach(p - p_low, q_high - q)
    high = p - q + reach(p_high - p, q - q_low)
    return {"value": p - q, "n": n, "low": round(low, 6), "high": round(high, 6)}
