"""Reads the rows and responses in run folders of attacks, scores and audits, and groups them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tunevax import records
from tunevax.errors import UsageError
from tunevax.evidence.rows import ROLES, Kind, completed, numbered_rows
from tunevax.evidence.stats import wilson
from tunevax.evidence.words import joined
from tunevax.records import MARGIN, METRIC, RESULTS, CellSummary, Generation, Row, RunRecord, Score, Traits, is_share


@dataclass(frozen=True)
class Point:
    """A score at one attack step."""

    step: int
    value: float  # mean over seeds; a share in [0, 1], but for perplexity and some lm-eval metrics
    low: float | None  # hull of the seeds' 95 % intervals, with `high`; None where a seed has none
    high: float | None
    n: int  # outputs, over all seeds (tokens for perplexity)
    seeds: int  # number of seeds

    def __str__(self) -> str:
        """'71 % [60, 80]' for a share."""
        interval = f" [{100 * self.ends[0]:.0f}, {100 * self.ends[1]:.0f}]" if self.ends else ""
        return f"{100 * self.value:.0f} %{interval}"

    @property
    def ends(self) -> tuple[float, float] | None:
        """The interval, if there is one."""
        return None if self.low is None or self.high is None else (self.low, self.high)

    @property
    def is_share(self) -> bool:
        """Whether value and interval are within [0, 1]."""
        return all(0 <= x <= 1 for x in (self.value, self.low, self.high) if x is not None)

    def overlaps(self, other: Point) -> bool:
        """Whether the two intervals share a value; a missing interval counts as the value alone."""
        (a, b), (c, d) = (p.ends or (p.value, p.value) for p in (self, other))
        return a <= d and c <= b


@dataclass
class Cell(Kind):
    """One model under one attack setting (attack None, kind 'none': before any attack)."""

    model: str
    attack: str | None
    kind: str
    role: str  # control, model or reference
    traits: Traits
    settings: dict[str, Any] = field(default_factory=dict)  # options that the protocol varies, as p and dose
    rows: dict[int, dict[int, Row]] = field(default_factory=dict)  # by seed, then by step
    stopped: set[int] = field(default_factory=set)  # seeds whose loss was not finite; rows up to there, or none
    failed: set[int] = field(default_factory=set)  # seeds whose run failed, without rows
    generations: dict[tuple[int, int], list[Generation]] = field(default_factory=dict)  # by (seed, step)
    folders: list[Path] = field(default_factory=list)  # the run folders of the rows

    @property
    def seeds(self) -> list[int]:
        """The seeds, ascending."""
        return sorted(self.rows)

    @property
    def whole(self) -> list[int]:
        """The seeds that means are taken over: those that did not stop early, or all if every one did."""
        return [seed for seed in self.seeds if seed not in self.stopped] or self.seeds

    @property
    def steps(self) -> list[int]:
        """The steps that every whole seed was evaluated at, so that no mean changes its seeds from step to step."""
        return sorted(set.intersection(*(set(self.rows[seed]) for seed in self.whole)))

    @property
    def batch(self) -> int | None:
        """Training samples per attack step, if that is a whole number."""
        step = self.steps[-1]
        samples = self.rows[self.whole[0]][step].get("samples")
        return samples // step if samples and step and samples % step == 0 else None

    def curve(self, score: str) -> list[Point]:
        """The score at every step at which every whole seed has it; empty if it was never measured."""
        points = (self.at(score, step) for step in self.steps)
        return [point for point in points if point is not None]

    def at(self, score: str, step: int) -> Point | None:
        """The score at one step, or None unless every whole seed has it."""
        rows = [self.rows[seed].get(step) for seed in self.whole]
        scores = [s for row in rows if row and (s := row["scores"].get(score))]
        return pool(score, step, scores) if len(scores) == len(rows) else None

    def worst(self, score: str) -> Point | None:
        """The highest point of the curve, the earliest of equals; None if it was never measured."""
        return max(self.curve(score), key=lambda point: point.value, default=None)

    def values(self, score: str, seed: int) -> list[tuple[int, float]]:
        """(step, value) of one seed at every step that has the score, by step."""
        by_step = ((step, row["scores"].get(score)) for step, row in sorted(self.rows[seed].items()))
        return [(step, float(s["value"])) for step, s in by_step if s]

    def steps_to(self, score: str, seed: int, phi: float) -> int | None:
        """The first evaluated step of one seed at which the score exceeds `phi`; None if it never does."""
        return next((step for step, value in self.values(score, seed) if value > phi), None)


@dataclass
class Results:
    """All cells of one or several runs."""

    cells: list[Cell]
    judges: list[str]  # scores `harmful/JUDGE` that every cell has, the lead first; keywords lead only if alone
    task: str | None  # the score that the benign task is read by (`task/exact`)
    notes: list[str] = field(default_factory=list)  # sentences on attacks named by hash, steps or judges left out
    failed: list[CellSummary] = field(default_factory=list)  # of the runs' run.json, as the following: cells
    skipped: list[CellSummary] = field(default_factory=list)  # attacks that do not apply
    stopped: list[CellSummary] = field(default_factory=list)  # attacks whose loss was not finite, as `Cell.stopped`

    @property
    def metrics(self) -> list[str]:
        """The scores `metric/NAME`, by name."""
        return self._named(METRIC)

    @property
    def margins(self) -> list[str]:
        """The scores `margin/JUDGE`, by name."""
        return self._named(MARGIN)

    def _named(self, prefix: str) -> list[str]:
        rows = (row for cell in self.cells for by_step in cell.rows.values() for row in by_step.values())
        return sorted({name for row in rows for name in row["scores"] if name.startswith(prefix)})

    @cached_property
    def _index(self) -> dict[tuple[str, str | None], Cell]:
        return {(c.model, c.attack): c for c in self.cells}

    @cached_property
    def roles(self) -> dict[str, str]:
        """Of each model: control, model or reference."""
        return {c.model: c.role for c in self.cells}

    @property
    def control(self) -> str | None:
        """The label of the control, or None."""
        return next((label for label, role in self.roles.items() if role == "control"), None)

    @property
    def models(self) -> list[str]:
        """Labels: the control first, then models, then references, each in the order of the rows."""
        return sorted(self.roles, key=lambda label: ROLES.index(self.roles[label]))

    @property
    def attacks(self) -> list[str]:
        """Names of the attack settings, in the order of the rows."""
        return list(dict.fromkeys(c.attack for c in self.cells if c.attack is not None))

    def cell(self, model: str | None, attack: str | None) -> Cell | None:
        """One model under one attack (None: before any attack), or None."""
        return self._index.get((model, attack)) if model is not None else None

    def of(self, model: str | None) -> list[Cell]:
        """The cells of a model under attacks, in the order of the rows."""
        return [c for c in self.cells if c.model == model and c.attack is not None]

    def under(self, attack: str | None) -> list[Cell]:
        """The cells of one attack, in the order of `models`."""
        return [cell for label in self.models if (cell := self._index.get((label, attack))) is not None]


def pool(score: str, step: int, scores: Sequence[Score]) -> Point:
    """Mean over seeds; the interval is the hull of the seeds' own, Wilson's where a share has none."""
    lows, highs = zip(*(_interval(score, s) for s in scores), strict=True)
    low, high = (None, None) if None in lows else (min(lows), max(highs))
    mean = math.fsum(s["value"] for s in scores) / len(scores)
    return Point(step, mean, low, high, sum(s["n"] for s in scores), len(scores))


def _interval(score: str, one: Score) -> tuple[float, float] | tuple[None, None]:
    low, high, n = one.get("low"), one.get("high"), one["n"]
    if low is not None and high is not None:
        return float(low), float(high)
    return wilson(round(one["value"] * n) / n, n) if is_share(score) else (None, None)


def read_results(paths: Iterable[Path]) -> Results:
    """Read run folders of attacks, scores and audits, and group their rows. Raises `UsageError`: as in `numbered_rows`;
    a damaged file of responses; two rows for one (model, attack, seed, step); cells without a judge or without an
    evaluated step in common."""
    read = {folder: numbered_rows(folder) for folder in dict.fromkeys(map(Path, paths))}
    if not read:
        raise UsageError("no run folder was named; give at least one, for example runs/attack")
    rows = [row for numbered in read.values() for _, row in numbered]
    ambiguous, roles, results = _ambiguous(rows), _roles(rows), Results([], [], None)
    cells: dict[tuple[str, str | None], Cell] = {}
    origin: dict[tuple, str] = {}
    recorded: set[int] = set()
    for folder, numbered in read.items():
        own: dict[tuple, Cell] = {}  # by the names in this folder: its generations carry no attack hash
        for number, row in numbered:
            attack = row.get("attack")
            if attack in ambiguous:
                attack = f"{attack} ({str(row.get('attack_hash') or 'no hash')[:8]})"
            here, key = f"{folder / RESULTS} line {number}", (row["model"], attack, row["seed"], row["step"])
            if key in origin:
                raise UsageError(
                    f"{here} repeats {origin[key]}: model '{key[0]}', attack {attack or 'none'}, seed {key[2]}, "
                    f"step {key[3]}; keep only one of them"
                )
            origin[key] = here
            cell = _add(cells, row, attack, roles[row["model"]])
            if folder not in cell.folders:
                cell.folders.append(folder)
            own[row["model"], row.get("attack"), row["seed"]] = cell
        for output in records.read_generations(folder, (row for _, row in numbered)):
            if of := own.get((output.get("model"), output.get("attack"), output.get("seed"))):
                of.generations.setdefault((output["seed"], output["step"]), []).append(output)
        info = records.read_run(folder) if records.is_run(folder) else RunRecord()
        failed, stopped = info.get("failed") or [], info.get("stopped") or []
        results.failed, results.stopped = results.failed + failed, results.stopped + stopped
        results.skipped += info.get("skipped") or []
        for key, cell in own.items():
            cell.failed |= {entry["seed"] for entry in failed if key[:2] == (entry.get("model"), entry.get("attack"))}
            cell.stopped |= {entry["seed"] for entry in stopped if key[:2] == (entry.get("model"), entry.get("attack"))}
        # An attack whose loss is not finite leaves no finished run; an audit goes on, and records which cells stopped.
        recorded |= {id(c) for c in own.values()} if "stopped" in info or info.get("verb") == "attack" else set()
    results.cells, notes = [*cells.values()], results.notes
    _ended_early([cell for cell in results.cells if id(cell) not in recorded])
    if names := joined(sorted(ambiguous)):
        notes.append(f"The attack name {names} is used for several settings; each is shown separately, with its hash.")
    if len(controls := list(dict.fromkeys(row["model"] for row in rows if row.get("role") == "control"))) > 1:
        notes.append(
            f"More than one control was named ({joined(controls)}): {controls[0]} is the one compared with, the others "
            "are shown as references."
        )
    results.judges, left_out = _judges(results.cells, rows)
    if left_out:
        names = joined(name.split("/", 1)[1] for name in left_out)
        notes.append(f"Not every model here was judged by {names}, so that judge is left out.")
    scores = dict.fromkeys(name for row in rows for name in row["scores"])
    results.task = next((n for n in ("task/exact", *scores) if n in scores and n.startswith("task/")), None)
    notes += _check_cells(results.cells, results.judges)
    return results


def from_rows(rows: Sequence[Row]) -> Results:
    """The results of rows in memory, without responses, as a screen needs them."""
    cells: dict[tuple[str, str | None], Cell] = {}
    roles = _roles(rows)
    for row in rows:
        _add(cells, completed(row, ()), row["attack"], roles[row["model"]])
    return Results([*cells.values()], _judges([*cells.values()], rows)[0], None)


def _add(cells: dict[tuple[str, str | None], Cell], row: Row, attack: str | None, role: str) -> Cell:
    """The cell of a row, with the row in it."""
    key = row["model"], attack
    if key not in cells:
        cells[key] = Cell(row["model"], attack, row["kind"], role, row["traits"], row["settings"])
    cells[key].rows.setdefault(row["seed"], {})[row["step"]] = row
    return cells[key]


def _ambiguous(rows: Sequence[Row]) -> set[str]:
    """Attack names of more than one setting, which must never be put into one curve."""
    named = ((row.get("attack"), row["seed"], str(row.get("attack_hash") or "")) for row in rows)
    counts = Counter((name, seed) for name, seed, _ in set(named))
    return {name for (name, _), count in counts.items() if name is not None and count > 1}


def _roles(rows: Sequence[Row]) -> dict[str, str]:
    """One role per label: a control in one row is one everywhere. Further controls become references."""
    roles: dict[str, str] = {}
    for row in rows:
        role = row.get("role", "model")
        roles[row["model"]] = min(role, roles.get(row["model"], role), key=("control", "reference", "model").index)
    controls = [label for label, role in roles.items() if role == "control"]
    return roles | {label: "reference" for label in controls[1:]}


def _ended_early(cells: list[Cell]) -> None:
    """Mark as stopped the runs that end before others of their attack, which without run.json nothing else says."""
    ends, curves = Counter[str | None](), [cell for cell in cells if cell.has_curve]
    for cell in curves:
        ends[cell.attack] = max(ends[cell.attack], *map(max, cell.rows.values()))
    for cell in curves:
        cell.stopped |= {seed for seed, by_step in cell.rows.items() if max(by_step) < ends[cell.attack]}


def _judges(cells: list[Cell], rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    """The judges that every cell has, the lead first, and those that only some have."""
    names = records.judges_of(n for row in rows for n in row["scores"])
    common = [n for n in names if all(cell.curve(n) for cell in cells)]
    return common, [n for n in names if n not in common]


def _check_cells(cells: list[Cell], judges: list[str]) -> list[str]:
    """UsageError for a cell that cannot be shown; otherwise sentences on steps left out or not shared."""
    notes = []
    for cell in cells:
        if not (steps := cell.steps):
            where = f"model '{cell.model}' under attack {cell.attack or 'none'}"
            raise UsageError(f"{where}: its seeds have no evaluated step in common, so they cannot be averaged")
        if not judges:
            raise UsageError("the models have no judge in common; score them with the same --judges")
        dropped = set.union(*(set(cell.rows[seed]) for seed in cell.whole)) - set(steps)
        if dropped:
            notes.append(
                f"{cell.model} under {cell.attack}: means leave out steps {joined(map(str, sorted(dropped)))}, "
                "because not every seed was evaluated there."
            )
    grids: dict[str, dict[str, list[int]]] = {}
    for cell in (c for c in cells if c.has_curve):
        grids.setdefault(str(cell.attack), {})[cell.model] = cell.steps
    for attack, by_model in grids.items():
        last = {model: grid[-1] for model, grid in by_model.items()}
        if len(set(last.values())) > 1:
            steps_of = joined(f"{model} {step:,}" for model, step in last.items())
            notes.append(f"Under {attack} the models were attacked for different numbers of steps: {steps_of}.")
        elif len({tuple(grid) for grid in by_model.values()}) > 1:
            notes.append(
                f"Under {attack} the models were evaluated at different steps; ratios read each model and the control "
                "at the steps that both have."
            )
    return notes
