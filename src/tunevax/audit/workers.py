"""The worker processes of an audit, and the files of its cells.

The folder `cells` has two files for each: NAME.json with its outcome and rows, and NAME.jsonl.gz with the responses.
results.jsonl is derived from them. A cell is complete once NAME.json exists.
"""

from __future__ import annotations

import gc
import gzip
import json
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tunevax.attacks.context import AttackContext, attack_data
from tunevax.attacks.kind import NotApplicable
from tunevax.audit.plan import AuditCell, AuditOptions, AuditPlan
from tunevax.audit.protocol import build
from tunevax.console import console
from tunevax.data.contamination import Exclusion
from tunevax.environment import peak_memory
from tunevax.errors import RunError
from tunevax.lineage import Lineage
from tunevax.records import CellRecord, Example, Generation, Row, harmful, read_object
from tunevax.scoring.suite import Suite, build_suite

if TYPE_CHECKING:
    from multiprocessing.sharedctypes import Synchronized

Run = Callable[[Sequence[AuditCell]], Iterator[tuple[AuditCell, str]]]
"""Runs cells, and yields each as it finishes, with a one-line result."""


@contextmanager
def pool(plan: AuditPlan, folder: Path, weights: Path | None, workers: int) -> Iterator[Run]:
    """Processes that run the cells of a plan, with one suite each; a single worker is this process, with the plan's."""
    if workers <= 1:
        here = Worker(plan.options, plan.exclusion, plan.suite)
        yield lambda cells: ((cell, here.run(cell, folder, weights)) for cell in cells)
        return
    import torch

    before, threads = os.environ.get("OMP_NUM_THREADS"), cores() // workers
    if before is not None and before.isdigit():  # the user may have set a lower limit
        threads = min(threads, int(before))
    os.environ["OMP_NUM_THREADS"] = str(max(1, threads))  # spinning threads of one worker would starve the other
    context = multiprocessing.get_context("spawn")
    try:
        setup = (plan.options, os.getpid(), context.Value("i", 0), torch.cuda.device_count(), plan.exclusion)
        with ProcessPoolExecutor(workers, context, _start_worker, setup) as processes:

            def run(cells: Sequence[AuditCell]) -> Iterator[tuple[AuditCell, str]]:
                futures = {processes.submit(_run_in_worker, cell, folder, weights): cell for cell in cells}
                for future in as_completed(futures):
                    yield futures[future], future.result()

            try:
                yield run
            except BaseException:
                processes.shutdown(wait=False, cancel_futures=True)
                for process in multiprocessing.active_children():  # now: the end of a cell may take minutes
                    process.terminate()
                raise
    finally:
        os.environ.pop("OMP_NUM_THREADS")
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before


def count_workers(workers: int, control: str) -> int:
    """`workers` if not 0; by default one per GPU, or without a GPU up to four for a small model."""
    import torch

    if workers:
        return workers
    if torch.cuda.is_available():
        return len(devices(torch.cuda.device_count()))
    base = Path(Lineage.of(control).base)
    files = [base] if base.is_file() else list(base.glob("*.safetensors"))
    size = sum(f.stat().st_size for f in files) or 2**40
    return min(4, cores()) if size < 2**28 else 1


VISIBLE = ("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")
"""The variables that select a process's accelerators; the first that is set takes precedence."""


def devices(count: int) -> list[str]:
    """The names of the `count` visible accelerators: numbers, UUIDs or MIG names as in the environment. CUDA shows a
    process only the first MIG device; here all of them are returned."""
    given = next((os.environ[name] for name in VISIBLE if name in os.environ), None)
    if given is None:
        return [str(number) for number in range(count)]
    names = [name.strip() for name in given.split(",")]
    names = names[: next((i for i, name in enumerate(names) if name in ("", "-1")), len(names))]  # CUDA stops there
    return names if count and all(name.startswith("MIG-") for name in names) else names[:count]


def cores() -> int:
    """The cores this process may use, which `taskset` and job schedulers limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Worker:
    """Runs cells; suite (if this process has none), data, base and scores of untouched models are loaded once."""

    def __init__(self, options: AuditOptions, exclusion: Exclusion, suite: Suite | None = None) -> None:
        self.options, self.exclusion = options, exclusion.fresh()
        suite = suite or build_suite(options, options.safety_data, options.task_data, exclusion=self.exclusion)
        # A model that refuses everything must show it somewhere.
        self.suite = suite._replace(benign=suite.benign or (suite.task and suite.task.rows))
        self.before: dict[Any, Any] = {}
        self.kept: dict[Any, Any] = {}
        self.rows: dict[frozenset[str], tuple[list[Example], list[Example]]] = {}

    def run(self, cell: AuditCell, folder: Path, weights: Path | None) -> str:
        """Run one cell, write its files, and return its result in one line."""
        import torch

        started = time.monotonic()
        keep = weights / cell.hash if weights is not None and cell.setting is not None else None
        outcome = cast(CellRecord, {"cell": cell.hash, "model": cell.target["label"], **cell.key})
        context: AttackContext | None = None
        was_quiet, console.quiet = console.quiet, True  # the audit has a progress bar of its own
        try:
            with tempfile.TemporaryDirectory() as scratch:
                context = self.context(cell, scratch, keep)
                if cell.setting is None:
                    loaded = context.load()
                    context.score(loaded.model, loaded.tokenizer, 0, full=True)
                else:
                    build(cell.setting.kind, cell.setting.values, cell.key["seed"], scratch).run(context)
                outcome["status"], summary = "done", worst(context.results)
        except RunError as error:  # training diverged; the scores until then count
            outcome |= {"status": "stopped", "error": str(error)}
            summary = f"{worst(context.results) if context and context.results else 'nothing scored'}, then {error}"
        except NotApplicable as error:
            outcome |= {"status": "skipped", "why": str(error)}
            summary = f"does not apply: {error}"
        except Exception as error:  # a failed cell must not stop the others
            first = str(error).strip().partition("\n")[0]
            outcome |= {"status": "failed", "error": f"{type(error).__name__}: {first}"[:500]}
            summary = f"FAILED: {outcome['error']}"
        finally:
            console.quiet = was_quiet
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        outcome |= {"seconds": round(time.monotonic() - started, 3), "peak_memory_bytes": peak_memory()}
        outcome["results"], generations = [], []
        if context is not None and outcome["status"] in ("done", "stopped"):
            outcome["record"], outcome["results"], generations = context.record, context.results, context.generations
        write_cell(folder, outcome, generations)
        return f"{summary} · {outcome['seconds']:.0f} s"

    def context(self, cell: AuditCell, scratch: str, keep: Path | None) -> AttackContext:
        """The attack context of one cell."""
        needs = frozenset(build(cell.setting.kind, cell.setting.values, 0, scratch).needs if cell.setting else ())
        if needs not in self.rows:
            self.rows[needs] = attack_data(self.options, needs, self.exclusion)
        harmful, task = self.rows[needs]
        return AttackContext(
            cell.target, self.options, harmful, task, self.suite, cell.key, keep, self.before, self.kept, self.exclusion
        )


def worst(rows: Sequence[Row]) -> str:
    """The worst harmful score of a cell's rows, as 'worst 85% (organism)'."""
    return "worst {:.0%} ({})".format(*max(harmful(row["scores"]) for row in rows))


_worker: Worker  # of this process, if it is one of a pool


def _start_worker(
    options: AuditOptions, parent: int, counter: Synchronized[int], gpus: int, exclusion: Exclusion
) -> None:
    """Set up a worker process: quiet, bound to its GPU, and ended with the audit."""
    from tqdm import tqdm

    from tunevax.quiet import quiet

    global _worker
    with counter.get_lock():
        number, counter.value = counter.value, counter.value + 1
    if given := devices(gpus):
        name = next((name for name in VISIBLE if name in os.environ), VISIBLE[-1])
        os.environ[name] = given[number % len(given)]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the audit gets Ctrl-C too, and ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    tqdm.set_lock(threading.RLock())  # the default is a semaphore, which outlives a process that is terminated
    quiet()
    console.quiet = True  # permanently: an interrupted worker must not draw progress bars
    _worker = Worker(options, exclusion)


def _run_in_worker(cell: AuditCell, folder: Path, weights: Path | None) -> str:
    return _worker.run(cell, folder, weights)


def write_cell(folder: Path, outcome: CellRecord, generations: Iterable[Generation]) -> None:
    """Write the two files of a cell atomically, NAME.json last."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in generations)
    compressed = gzip.compress(lines.encode(errors="backslashreplace"), mtime=0)  # mtime=0: reproducible bytes
    content = json.dumps(outcome, default=str).encode()
    for name, data in ((f"{outcome['cell']}.jsonl.gz", compressed), (f"{outcome['cell']}.json", content)):
        part = folder / f"{name}.{os.getpid()}.part"
        part.write_bytes(data)
        part.replace(folder / name)


def read_cell(folder: Path, name: str) -> CellRecord:
    """The outcome of a cell, with its rows."""
    return cast(CellRecord, read_object(folder / f"{name}.json"))
