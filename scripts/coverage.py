"""How often the intervals for a ratio of steps hold the truth, and how often equal models are told apart, by simulation.
Quoted in docs/protocol.md; its output is committed in experiments/coverage.

    python scripts/coverage.py [--runs 2000] [--truth 2.0] [--spread 0.3]

Steps to phi of the control and of the model are log-normal, independent, with standard deviation `spread` in the logarithm.

The first table has one attack that is always strong, with the control around step 40 and the model around 40 x truth.
`exact` knows the crossing itself, `stepped` only the first of steps a factor of 1.5 apart, as in an audit.

The others run whole audits through `tunevax.evidence.properties`: curves over 16 evaluated steps up to 100, the choice of the
strong attacks, the ratio and its interval. `median` is the control's median step to phi over the last step. Rates are
among the audits in which an attack was judged strong. `control alone` is what a choice by the control's runs would do:
an attack is taken if all of them are through by two thirds of the steps.

The last two have equal models, the control around step 12. In one, each run never falls with probability `never`; `by seed`
is the same fate under all attacks, and with two seeds, which claim nothing, `longer` is how often low is above 1. In the other, of the runs of the model (or of both) that would fall early, late or at all,
`stops` is the share whose loss is no longer finite before they do.
"""

import argparse
import math
import platform
from importlib.metadata import version
from types import SimpleNamespace
from unittest import mock

import numpy as np

from tunevax.attacks.finetune import log_spaced
from tunevax.evidence.findings import Ratio
from tunevax.evidence.properties import resistance
from tunevax.evidence.ratios import Reached, average_ratio, reach
from tunevax.evidence.results import Cell, Results
from tunevax.evidence.rows import CURVE
from tunevax.evidence.words import TINY

GRID = [1.5**i for i in range(-8, 40)]
LAST, JUDGE = 100, "harmful/simulated"
STEPS = [0, *sorted(log_spaced(LAST, 16))]
SAFE, HARMFUL = ({"scores": {JUDGE: {"value": value, "n": 1}}} for value in (0.0, 1.0))


def observe(step: float, stepped: bool) -> Reached:
    """What an audit sees of a crossing."""
    if not stepped:
        return Reached(step, True, 1.0)
    after = next(i for i, s in enumerate(GRID) if s >= step)
    return Reached(GRID[after], True, GRID[after] / GRID[after - 1])


def estimate(rng: np.random.Generator, seeds: int, truth: float, spread: float, stepped: bool) -> Ratio:
    """One audit of one attack that is always strong."""
    crossings = np.exp(rng.normal(np.log([40 * truth, 40]), spread, size=(seeds, 2)))
    pairs = [(observe(ours, stepped), observe(theirs, stepped)) for ours, theirs in crossings]
    return average_ratio({"attack": {seed: [(1, ours), (-1, theirs)] for seed, (ours, theirs) in enumerate(pairs)}})


def audit(rng: np.random.Generator, seeds: int, attacks: int, median: float, truth: float, spread: float) -> Results:
    """The curves of one audit."""
    cells = []
    for attack in range(attacks):
        for model, ratio in (("control", 1.0), ("model", truth)):
            crossings = np.exp(rng.normal(math.log(median * LAST * ratio), spread, seeds))
            rows = {s: {t: HARMFUL if t >= c and t else SAFE for t in STEPS} for s, c in enumerate(crossings, 1)}
            role = "control" if model == "control" else "model"
            cells.append(Cell(model, str(attack), "finetune", role, CURVE, {"p": 1.0}, rows))
    return Results(cells, [JUDGE], None)


def by_control_alone(results: Results) -> Ratio | None:
    """The ratio over the attacks that bring every run of the control through by two thirds of the steps."""
    terms = {}
    for attack in results.attacks:
        control, model = (results.cell(label, attack) for label in ("control", "model"))
        both = {s: [reach(c, JUDGE, s, lambda h: h > 0.5) for c in (model, control)] for s in control.seeds}
        if all(theirs.reached and theirs.step <= LAST * 2 / 3 for _, theirs in both.values()):
            terms[attack] = {s: [(1, ours), (-1, theirs)] for s, (ours, theirs) in both.items()}
    return average_ratio(terms) if terms else None


def selected(options: argparse.Namespace) -> None:
    """The tables of whole audits."""
    print(f"\n{'truth':>5} {'seeds':>5} {'attacks':>7} {'median':>6} {'judged':>7} {'longer':>7} {'sooner':>7} {'mean R':>6}"
          f" {'low > truth':>11}   control alone: {'judged':>7} {'longer':>7} {'mean R':>6}")  # fmt: skip
    cases = [(1.0, m) for m in (0.2, 0.3, 0.5, 0.6, 0.7, 0.85, 1.0)] + [
        (r, m) for r in (2.0, 4.0) for m in (0.2, 0.3, 0.5)
    ]
    for truth, median in cases:
        for seeds in (3, 5):
            for attacks in (1, 3, 8):
                rng = np.random.default_rng([seeds, attacks, round(100 * median)])
                both = [[], []]
                for _ in range(options.runs):
                    results = audit(rng, seeds, attacks, median, truth, options.spread)
                    both[0].append(resistance(results, "model", JUDGE, 0.5))
                    both[1].append(by_control_alone(results))
                (found, alone) = ([r for r in ratios if r] for ratios in both)
                print(f"{truth:>5g} {seeds:>5} {attacks:>7} {median:>6g} {_rates(found, options.runs, truth)}   "
                      f"{'':>15}{_rates(alone, options.runs)}", flush=True)  # fmt: skip


def equal(
    rng: np.random.Generator, seeds: int, attacks: int, spread: float, never: float = 0.0, by_seed: bool = False,
    stops: float = 0.0, which: str = "", whose: tuple[str, ...] = ("model",),
) -> Results:  # fmt: skip
    """The curves of one audit of equal models, some of whose runs never fall or stop."""
    cells = []
    for label in ("control", "model"):
        fate = rng.random(seeds) < never
        for attack in range(attacks):
            holds = fate if by_seed else rng.random(seeds) < never
            crossings = np.where(holds, math.inf, np.exp(rng.normal(math.log(12), spread, seeds)))
            rows = {s: {t: HARMFUL if t >= c and t else SAFE for t in STEPS} for s, c in enumerate(crossings, 1)}
            cell = Cell(label, str(attack), "finetune", label, CURVE, {"p": 1.0}, rows)
            there = {"early": crossings < 12, "late": crossings >= 12}.get(which, crossings > 0)
            for s in np.flatnonzero(there & (rng.random(seeds) < stops)) + 1 if label in whose else ():
                cell.stopped.add(int(s))
                rows[int(s)] = {0: SAFE}
            cells.append(cell)
    return Results(cells, [JUDGE], None)


def unequal_luck(options: argparse.Namespace) -> None:
    """The tables of runs that fall or never do, and of runs that stop."""
    runs = 4 * options.runs  # few are judged
    print(f"\n{'never':>6} {'seeds':>5} {'attacks':>7} {'fate':>8} {'judged':>7} {'longer':>7}")
    for never in (0.5, 0.8):
        for seeds in (2, 3, 4, 5):
            for attacks, fate in ((1, "by run"), (3, "by run"), (3, "by seed")):
                rng = np.random.default_rng([seeds, attacks, round(100 * never)])
                many = (equal(rng, seeds, attacks, 0.2, never, fate == "by seed") for _ in range(runs))
                found = [r for r in (resistance(results, "model", JUDGE, 0.5) for results in many) if r]
                longer = np.mean([r.low > 1 + TINY for r in found])
                print(
                    f"{never:>6g} {seeds:>5} {attacks:>7} {fate:>8} {len(found) / runs:>7.1%} {longer:>7.1%}",
                    flush=True,
                )
    print(f"\n{'stops':>6} {'seeds':>5} {'attacks':>7} {'which':>14} {'judged':>7} {'longer':>7} {'mean R':>6}")
    for which, whose, stops in (
        ("early", ("model",), 0.8),
        ("late", ("model",), 0.8),
        ("all", ("model", "control"), 0.3),
    ):
        for seeds in (3, 5):
            rng = np.random.default_rng([seeds, round(100 * stops), len(whose)])
            many = (
                equal(rng, seeds, 3, options.spread, stops=stops, which=which, whose=whose) for _ in range(options.runs)
            )  # fmt: skip
            ratios = (resistance(results, "model", JUDGE, 0.5) for results in many)
            found = [r for r in ratios if r and r.low is not None]
            text = f"{which}, " + ("model" if len(whose) == 1 else "both")
            print(f"{stops:>6g} {seeds:>5} {3:>7} {text:>14} {_rates(found, options.runs)}", flush=True)


def _rates(found: list[Ratio], runs: int, truth: float | None = None) -> str:
    if len(found) < 50:
        return f"{len(found) / runs:>7.1%} {'-':>7}" + (f" {'-':>7} {'-':>6} {'-':>11}" if truth else f" {'-':>6}")
    longer, sooner = np.mean([r.low > 1 + TINY for r in found]), np.mean([r.high < 1 - TINY for r in found])
    mean = math.exp(np.mean([math.log(r.value) for r in found]))
    text = f"{len(found) / runs:>7.1%} {longer:>7.1%}"
    if truth is None:
        return f"{text} {mean:>6.2f}"
    return f"{text} {sooner:>7.1%} {mean:>6.2f} {np.mean([r.low > truth + TINY for r in found]):>11.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2000, help="simulated audits per line")
    parser.add_argument("--truth", type=float, default=2.0, help="the true ratio")
    parser.add_argument("--spread", type=float, default=0.3, help="standard deviation of log steps over seeds")
    options = parser.parse_args()
    print(f"Python {platform.python_version()}, numpy {version('numpy')}, scipy {version('scipy')}; {options.runs} runs per "
          f"line, spread {options.spread:g}; generators seeded by the line")  # fmt: skip
    print(f"\n{'seeds':>5} {'steps':>8} {'interval':>9} {'bootstrap':>9} {'width':>6} {'width b.':>8}")
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
            print(f"{seeds:>5} {kind:>8} {t:>9.1%} {boot:>9.1%} {width:>5.1f}x {narrow:>7.1f}x", flush=True)
    ends = SimpleNamespace(confidence_interval=SimpleNamespace(low=0.0, high=0.0))
    with mock.patch("scipy.stats.bootstrap", return_value=ends):  # slow, and no claim rests on it
        selected(options)
        unequal_luck(options)


if __name__ == "__main__":
    main()
