"""How often the intervals for a ratio of steps hold the truth, by simulation. Quoted in docs/protocol.md.

    python scripts/coverage.py [--runs 2000] [--truth 2.0] [--spread 0.3]

One attack; for each seed the control's and the model's steps to phi are log-normal around 40 and 40 x truth, independent,
with standard deviation `spread` in the logarithm. `exact` knows the crossing itself, `stepped` only the first of steps a
factor of 1.5 apart, as in an audit.
"""

import argparse
import math

import numpy as np

from tunevax.audit.findings import Ratio
from tunevax.audit.properties import Reached, average_ratio

GRID = [1.5**i for i in range(-8, 40)]


def observe(step: float, stepped: bool) -> Reached:
    """What an audit sees of a crossing."""
    if not stepped:
        return Reached(step, True, 1.0)
    after = next(i for i, s in enumerate(GRID) if s >= step)
    return Reached(GRID[after], True, GRID[after] / GRID[after - 1])


def estimate(rng: np.random.Generator, seeds: int, truth: float, spread: float, stepped: bool) -> Ratio:
    """One audit."""
    crossings = np.exp(rng.normal(np.log([40 * truth, 40]), spread, size=(seeds, 2)))
    pairs = [(observe(ours, stepped), observe(theirs, stepped)) for ours, theirs in crossings]
    return average_ratio({"attack": {seed: [(1, ours), (-1, theirs)] for seed, (ours, theirs) in enumerate(pairs)}})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2000, help="simulated audits per line")
    parser.add_argument("--truth", type=float, default=2.0, help="the true ratio")
    parser.add_argument("--spread", type=float, default=0.3, help="standard deviation of log steps over seeds")
    options = parser.parse_args()
    print(f"{'seeds':>5} {'steps':>8} {'interval':>9} {'bootstrap':>9} {'width':>6} {'width b.':>8}")
    for seeds in (3, 5, 10):
        for stepped in (False, True):
            rng = np.random.default_rng(seeds)
            found = [estimate(rng, seeds, options.truth, options.spread, stepped) for _ in range(options.runs)]
            t = np.mean([r.low <= options.truth <= r.high for r in found])
            boot = np.mean([r.bootstrap[0] <= options.truth <= r.bootstrap[1] for r in found])
            # Widths are the median of high / low.
            width = math.exp(np.median([math.log(r.high / r.low) for r in found]))
            narrow = math.exp(np.median([math.log(r.bootstrap[1] / r.bootstrap[0]) for r in found]))
            kind = "stepped" if stepped else "exact"
            print(f"{seeds:>5} {kind:>8} {t:>9.1%} {boot:>9.1%} {width:>5.1f}x {narrow:>7.1f}x")


if __name__ == "__main__":
    main()
