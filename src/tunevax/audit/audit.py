"""`tunevax audit`: every attack of a protocol on every model and the control, and a run folder of evidence.

A cell is one attack on one model with one seed. Each is written whole, under the hash of everything that decides it, so
a killed audit goes on where it was, and no row is lost or written twice.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tunevax.audit.cells import AuditCell, cells_of, contents
from tunevax.audit.plan import AuditPlan
from tunevax.audit.workers import count_workers, finished
from tunevax.console import bar, console
from tunevax.environment import require_one_process
from tunevax.errors import UsageError
from tunevax.evidence.properties import worst_case
from tunevax.evidence.ratios import withstood
from tunevax.evidence.results import from_rows
from tunevax.records import DROPPED, is_run, read_lines, read_run
from tunevax.run_lock import refuse_if_held
from tunevax.runs import clear, partial_of, writing


def audit(plan: AuditPlan, command: str = "") -> Path:
    """Run the cells that are not there yet, and return the run folder. See run.json's `failed` for cells that failed.

    Raises:
        UsageError: the folder is in the way, or an unfinished audit in it was started with other options.
    """
    options, protocol = plan.options, plan.protocol
    if not options.output_dir:
        raise UsageError("--output-dir is missing")
    require_one_process("an audit")
    config = {k: v for k, v in vars(options).items()
              if k not in ("output_dir", "overwrite", "workers", "dry_run", "keep_attacked")}  # fmt: skip
    record: dict[str, Any] = {
        "verb": "audit", "method": protocol.name, "command": command, "seed": protocol.seeds[0], "parent": None,
        "config": {**config, "protocol": asdict(protocol)}, "data": plan.data, "targets": plan.targets,
        "overlap_dropped": plan.exclusion.summary(),
        "skipped": list(plan.skipped), "lm_eval": plan.harness, "fluency_hash": contents(options.fluency_model),
    }  # fmt: skip
    final = Path(options.output_dir).absolute()
    if is_run(final) and not options.overwrite:
        reopen(final, record["config"])
    with writing(options.output_dir, record, resume=True, overwrite=options.overwrite) as run:
        folder = run.path / "cells"
        folder.mkdir(exist_ok=True)
        if plan.exclusion.dropped:
            run.write_lines(DROPPED, plan.exclusion.dropped)
        grid = plan.grid
        cells = cells_of(plan, grid, True, protocol.screen == 0)
        run_cells(plan, cells, folder, run.path / "weights")
        if protocol.screen:
            keep = strongest(plan, cells, folder)
            more = cells_of(plan, [s for s in grid if s.name in keep], False, True)
            run_cells(plan, more, folder, run.path / "weights")
            cells += more
        assemble(run, cells, folder)
    shutil.rmtree(run.final / "cells", ignore_errors=True)  # last: a kill before the folder has its name must find them
    return run.final


def run_cells(plan: AuditPlan, cells: Sequence[AuditCell], folder: Path, weights: Path) -> None:
    """Run the cells whose file is not in `folder`, one line per finished cell."""
    left = [cell for cell in cells if not (folder / f"{cell.hash}.json").exists()]
    done = len(cells) - len(left)
    if done:
        console.print(f"{done} of {len(cells)} cells are there already", highlight=False)
    workers = min(count_workers(plan.options.workers, str(plan.options.control)), len(left))
    with bar() as progress:
        task = progress.add_task("audit", total=len(cells), completed=done, note="")
        for cell, result in finished(
            plan.options, left, folder, weights if plan.options.keep_attacked else None, workers, plan.exclusion
        ):
            done += 1
            console.print(
                f"[{done}/{len(cells)}] {cell.told} · {result}", highlight=False, markup=False, soft_wrap=True
            )
            progress.advance(task)


def strongest(plan: AuditPlan, cells: Sequence[AuditCell], folder: Path) -> set[str]:
    """The names of the `screen` plain fine-tunes that each model withstands least; and the attack that its worst case
    is picked from, so that it is measured again. The first seed decides.

    Other attacks go on only if they name seeds of their own, and those have run already.
    """
    first = [c for c in cells if c.setting is None or c.key["seed"] == c.setting.seeds[0]]
    files = [folder / f"{cell.hash}.json" for cell in first]
    results = from_rows([row for file in files for row in json.loads(file.read_text(encoding="utf-8"))["results"]])
    judge, phi, kept = next(iter(results.judges), ""), plan.protocol.phi, set()
    for model in results.models:
        ranked = sorted((*withstood(c, judge, phi), str(c.attack)) for c in results.of(model) if c.plain)
        kept |= {name for *_, name in ranked[: plan.protocol.screen]}
        if worst := worst_case(results, model, judge, phi, plan.protocol.epsilon):
            kept.add(worst.attack)
    return kept


RAN = ("done", "stopped")


def assemble(run: Any, cells: Sequence[AuditCell], folder: Path) -> None:
    """The cells' files as results.jsonl, generations.jsonl and cells.jsonl, in the order of the protocol."""
    outcomes = [json.loads((folder / f"{cell.hash}.json").read_text(encoding="utf-8")) for cell in cells]
    for name, key in (("results.jsonl", "results"), ("generations.jsonl", "generations")):
        run.write_lines(name, [row for outcome in outcomes for row in outcome[key]])
    run.write_lines(
        "cells.jsonl", [{k: v for k, v in o.items() if k not in ("results", "generations")} for o in outcomes]
    )
    record = run.record
    told = ("cell", "model", "attack", "seed")
    for status in ("failed", "stopped"):
        record[status] = [{k: o[k] for k in (*told, "error")} for o in outcomes if o["status"] == status]
    record["skipped"] += [{k: o[k] for k in (*told, "why")} for o in outcomes if o["status"] == "skipped"]
    record["cells"], record["cell_seconds"] = len(cells), round(sum(o["seconds"] for o in outcomes), 1)
    record["peak_memory_bytes"] = max(o["peak_memory_bytes"] for o in outcomes)
    for target in record["targets"]:
        own = next((o["record"] for o in outcomes if o["model"] == target["label"] and o["status"] in RAN), {})
        target.update({k: own[k] for k in ("template_hash", "parameters", "class", "base") if k in own})
    done = [o["record"] for o in outcomes if o["status"] in RAN]
    if not done:
        raise UsageError(
            f"every cell failed; the first: {record['failed'][0]['error'] if record['failed'] else 'none ran'}"
        )


def reopen(final: Path, config: dict[str, Any]) -> None:
    """Make a finished audit with failed cells unfinished again, so that only these run.

    Raises:
        UsageError: it is complete, or was made with other options.
    """
    record = read_run(final)
    same = json.loads(json.dumps(config, default=str)) == record.get("config")
    if record.get("verb") != "audit" or not same or not record.get("failed"):
        what = (
            "is a finished audit" if record.get("verb") == "audit" and same else "is a finished run with other options"
        )
        raise UsageError(f"{final} {what}; choose another --output-dir, or pass --overwrite to replace it")
    partial = partial_of(final)
    refuse_if_held(partial)
    if partial.exists():  # a kill came between the next two steps of an earlier call
        clear(final)
        return
    rows = {name: read_lines(final / f"{name}.jsonl") for name in ("results", "generations", "cells")}
    new = partial.with_name(partial.name + ".reopened")
    shutil.rmtree(new, ignore_errors=True)
    (new / "cells").mkdir(parents=True)
    for outcome in rows["cells"]:
        if outcome["status"] == "failed":
            continue
        place = [outcome[k] for k in ("model", "attack", "seed")]
        outcome["results"] = [r for r in rows["results"] if r["cell"] == outcome["cell"]]
        outcome["generations"] = [
            g for g in rows["generations"] if [g[k] for k in ("model", "attack", "seed")] == place
        ]
        (new / "cells" / f"{outcome['cell']}.json").write_text(json.dumps(outcome), encoding="utf-8")
    (new / "config.json").write_text(
        json.dumps({"verb": "audit", "method": record["method"], "config": record["config"]}), encoding="utf-8"
    )
    if (final / "weights").exists():
        shutil.copytree(final / "weights", new / "weights")
    new.rename(partial)
    clear(final)
