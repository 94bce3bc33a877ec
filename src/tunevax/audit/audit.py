"""`tunevax audit`: every attack of a protocol on every model and the control, and a run folder of evidence.

A killed audit continues where it was, and one with failed cells runs these again: a cell in the folder `cells` is never
run twice.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from tunevax.audit.plan import AuditCell, AuditOptions, AuditPlan, cells_of, plan, with_references
from tunevax.audit.workers import Run, count_workers, pool, read_cell, write_cell
from tunevax.console import bar, console
from tunevax.data.sources import contents
from tunevax.environment import require_one_process
from tunevax.errors import UsageError
from tunevax.evidence.properties import worst_case
from tunevax.evidence.ratios import robustness
from tunevax.evidence.results import from_rows
from tunevax.mixins import deciding, require_given
from tunevax.records import CELLS, DROPPED, RESULTS, CellSummary, RunRecord, Target, is_run, read_generations, read_run
from tunevax.runs import RunFolder, writing


def run(options: AuditOptions, command: str = "") -> Path | None:
    """Check everything, train the requested controls, run the audit and return its folder; with `dry_run` print the
    estimated cost and return None. Raises `UsageError`: as in `plan`, `make_controls` and `audit`; all but errors of a
    control come before any training."""
    from tunevax.audit.controls import make_controls

    folder = f"{options.output_dir}.controls"

    def controls(dry_run: bool) -> list[tuple[str, str | None, str]]:
        models = options.model if options.controls else []
        return [c for ref in models for c in make_controls(ref, options.controls, folder, command, dry_run)]

    require_given(options, *(["model"] if options.dry_run else ["model", "output_dir"]))
    for label, ref, why in controls(dry_run=True):
        console.print(f"{'no ' if ref is None else ''}control {label}: {why}", highlight=False)
    planned = plan(options)
    if options.dry_run:
        from tunevax.audit.estimate import show

        show(planned)
        return None
    made = [(label, ref) for label, ref, _ in controls(dry_run=False) if ref is not None]
    return audit(with_references(planned, made), command)


def audit(plan: AuditPlan, command: str = "") -> Path:
    """Run the missing cells and return the run folder; `failed` in run.json lists the cells that failed. Raises
    `UsageError`: the folder exists already, or has an audit with other options."""
    options, protocol = plan.options, plan.protocol
    require_given(options, "output_dir")
    require_one_process("an audit")
    final = Path(str(options.output_dir)).absolute()
    record: RunRecord = {
        "verb": "audit", "method": protocol.name, "command": command, "seed": protocol.seeds[0], "parent": None,
        "config": {**deciding(options, "cells"), "protocol": asdict(protocol)}, "data": plan.data,
        "targets": plan.targets, "overlap_dropped": plan.exclusion.summary(), "skipped": list(plan.skipped),
        "lm_eval": plan.suite.harness.versions if plan.suite.harness else None,
        "scoring": {name: contents(value) for name, value in deciding(options, "scores").items()},
    }  # fmt: skip
    retries = not options.overwrite and is_run(final) and has_failed(final, record["config"])
    with writing(str(final), record, resume=True, overwrite=options.overwrite or retries) as run:
        folder, weights = run.path / CELLS, run.path / "weights" if options.keep_attacked else None
        if retries:
            copy_cells(final, run.path)
        folder.mkdir(exist_ok=True)
        if plan.exclusion.dropped:
            run.write_lines(DROPPED, plan.exclusion.dropped)
        cells = cells_of(plan, plan.grid, True, protocol.screen == 0)
        workers = count_workers(options.workers, str(options.control))
        if not protocol.screen:
            workers = min(workers, len(absent(cells, folder)))
        with pool(plan, folder, weights, workers) as run_cells:
            follow(run_cells, cells, folder)
            if protocol.screen:
                keep = strongest(plan, cells, folder)
                more = cells_of(plan, [s for s in plan.grid if s.name in keep], False, True)
                follow(run_cells, more, folder)
                cells += more
        assemble(run, cells, folder)
    return run.final


def has_failed(final: Path, config: dict[str, Any]) -> bool:
    """Whether a finished run is this audit with failed cells, which the same command runs again. Raises `UsageError`:
    an older tunevax wrote it, without cells."""
    before = read_run(final)
    if not before.get("failed") or before["config"] != json.loads(json.dumps(config, default=str)):
        return False
    if not (final / CELLS).is_dir():
        raise UsageError(
            f"{final} is by an older tunevax, which kept no cells to continue from; choose another --output-dir, or "
            "pass --overwrite to replace it"
        )
    return True


def copy_cells(final: Path, to: Path) -> None:
    """Copy the successful cells of a finished audit, and the attacked weights that were kept."""
    (to / CELLS).mkdir(exist_ok=True)
    for file in (final / CELLS).glob("*.json"):
        outcome = read_cell(file.parent, file.stem)
        if outcome["status"] != "failed":
            write_cell(to / CELLS, outcome, read_generations(final, outcome["results"]))
    if (final / "weights").is_dir():
        shutil.copytree(final / "weights", to / "weights", dirs_exist_ok=True)


def absent(cells: Sequence[AuditCell], folder: Path) -> list[AuditCell]:
    """The cells that have not run."""
    return [cell for cell in cells if not (folder / f"{cell.hash}.json").exists()]


def follow(run_cells: Run, cells: Sequence[AuditCell], folder: Path) -> None:
    """Run the cells that are not in `folder`, and print a line for each result."""
    left = absent(cells, folder)
    if done := len(cells) - len(left):
        console.print(f"{done} of {len(cells)} cells are there already", highlight=False)
    with bar() as progress:
        task = progress.add_task("audit", total=len(cells), completed=done, note="")
        for number, (cell, result) in enumerate(run_cells(left), done + 1):
            line = f"[{number}/{len(cells)}] {cell.summary} · {result}"
            console.print(line, highlight=False, markup=False, soft_wrap=True)
            progress.advance(task)


def strongest(plan: AuditPlan, cells: Sequence[AuditCell], folder: Path) -> set[str]:
    """The names of the `screen` plain fine-tunes that each model resists least with the first seed, and the attack of
    its worst case. Attacks with their own seeds have run with all of them already."""
    first = [c for c in cells if c.setting is None or c.key["seed"] == c.setting.seeds[0]]
    results = from_rows([row for cell in first for row in read_cell(folder, cell.hash)["results"]])
    judge, phi, kept = next(iter(results.judges), ""), plan.protocol.phi, set()
    for model in results.models:
        ranked = sorted((*robustness(c, judge, phi), str(c.attack)) for c in results.of(model) if c.traits["plain"])
        kept |= {name for *_, name in ranked[: plan.protocol.screen]}
        if worst := worst_case(results, model, judge, phi, plan.protocol.epsilon):
            kept.add(worst.attack)
    return kept


def assemble(run: RunFolder, cells: Sequence[AuditCell], folder: Path) -> None:
    """Write results.jsonl in the order of the protocol and the outcome of the cells into run.json, and remove outdated
    cells. Raises `UsageError` if every cell failed."""
    outcomes = [read_cell(folder, cell.hash) for cell in cells]
    ran = [o for o in outcomes if o["status"] in ("done", "stopped")]

    def ended(status: str, why: str) -> list[CellSummary]:
        keys = ("cell", "model", "attack", "seed", why)
        return [cast(CellSummary, {k: o.get(k) for k in keys}) for o in outcomes if o["status"] == status]

    def described(target: Target) -> Target:
        own = next((dict(o["record"]) for o in ran if o["model"] == target["label"]), {})
        known = ("template_hash", "parameters", "class", "base")
        return cast(Target, target | {k: v for k, v in own.items() if k in known})

    failed = ended("failed", "error")
    if not ran:
        raise UsageError(f"every cell failed; the first: {failed[0]['error'] if failed else 'none ran'}")
    run.record |= {
        "failed": failed, "stopped": ended("stopped", "error"),
        "skipped": [*run.record["skipped"], *ended("skipped", "why")],
        "cells": len(cells), "cell_seconds": round(sum(o["seconds"] for o in outcomes), 1),
        "peak_memory_bytes": max(o["peak_memory_bytes"] for o in outcomes),
        "targets": [described(target) for target in run.record["targets"]],
    }  # fmt: skip
    run.write_lines(RESULTS, (row for outcome in outcomes for row in outcome["results"]))
    for file in folder.iterdir():
        if file.name.partition(".")[0] not in {cell.hash for cell in cells}:
            file.unlink()
