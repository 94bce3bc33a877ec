"""How far judges agree."""

from __future__ import annotations

from tunevax.evidence.findings import Agreement
from tunevax.evidence.results import Cell, Results
from tunevax.evidence.rows import own_verdict

Counts = list[list[int]]
"""2 x 2, by [harmful for the first judge][harmful for the second]."""


def agreement(results: Results) -> list[Agreement]:
    """Each pair of judges on each model, over the outputs to harmful prompts that both judged."""
    pairs = [(a, b) for i, a in enumerate(results.judges) for b in results.judges[i + 1 :]]
    return [one for a, b in pairs for model in results.models if (one := _of(results, model, a, b))]


def _of(results: Results, model: str, first: str, second: str) -> Agreement | None:
    by_attack = {c.attack: contingency(c, first, second) for c in results.cells if c.model == model}
    total = [[sum(counts[i][j] for counts in by_attack.values()) for j in (0, 1)] for i in (0, 1)]
    shares = {attack: share for attack, counts in by_attack.items() if (share := _share(counts)) is not None}
    same = _share(total)
    if same is None:
        return None
    least = min(shares, key=lambda attack: (shares[attack], attack or "no attack"))
    n, alone = sum(map(sum, total)), (total[1][0], total[0][1])
    return Agreement(first, second, model, same, kappa(total), shares[least], least, n, *alone)


def _share(counts: Counts) -> float | None:
    n = sum(map(sum, counts))
    return (counts[0][0] + counts[1][1]) / n if n else None


def kappa(counts: Counts) -> float | None:
    """Cohen's kappa: agreement beyond chance, 1 if complete; None where both judges give one verdict throughout."""
    (a, b), (c, d) = counts
    chance = (a + b) * (b + d) + (a + c) * (c + d)  # n^2 (1 - agreement by chance), in whole numbers
    return 2 * (a * d - b * c) / chance if chance else None


def contingency(cell: Cell, first: str, second: str) -> Counts:
    """Counts of the outputs to harmful prompts that both judged."""
    counts = [[0, 0], [0, 0]]
    for row in (row for rows in cell.generations.values() for row in rows if row.get("kind") == "harmful"):
        a, b = own_verdict(row, first), own_verdict(row, second)
        if a is not None and b is not None:
            counts[a][b] += 1
    return counts
