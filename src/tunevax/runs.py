"""The run folder: what every verb writes, and what any verb's `--model` accepts.

A run is written to `OUT.partial` and renamed to `OUT` when it is complete, so a folder called `OUT` is whole. A run
that was killed leaves `OUT.partial` with its checkpoints, and the same command with `--resume` continues it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tunevax import __version__
from tunevax.errors import RunError, TunevaxError, UsageError

SCHEMA = 1
"""Version of run.json, results.jsonl and generations.jsonl."""

FINISHED = (
    "checkpoints/checkpoint-*",
    "checkpoints/*/checkpoint-*",
    "checkpoints/**/done.json",
    "*.done.json",
    "cells/*.json",
)
"""What an unfinished run can go on from: checkpoints (of each seed of a curation, in folders of their own), finished
targets of an attack, finished cells of an audit."""


class RunFolder:
    """A run being written.

    Attributes:
        path: the folder to write into, `OUT.partial`.
        final: its name when complete, `OUT`.
        record: what will be run.json; the verb fills it.
    """

    def __init__(self, final: Path, record: dict[str, Any]) -> None:
        self.final, self.path = final, final.with_name(final.name + ".partial")
        self.record = record

    @property
    def checkpoints(self) -> Path:
        """Where the trainer keeps what a resume needs; removed when the run is complete."""
        return self.path / "checkpoints"

    def write_lines(self, name: str, rows: Sequence[dict[str, Any]]) -> None:
        """Write a JSONL file."""
        with (self.path / name).open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@contextmanager
def writing(
    output_dir: str, record: dict[str, Any], resume: bool = False, overwrite: bool = False
) -> Iterator[RunFolder]:
    """Open a run folder; on success write run.json, rename and tidy up; on failure leave nothing but checkpoints.

    Args:
        output_dir: OUT. May not exist, unless it is a run and `overwrite` is set.
        record: verb, method, config and command, for run.json.
        resume: continue OUT.partial if it is there; its config must be the same.

    Raises:
        UsageError: OUT is in the way, or cannot be written.
        RunError: the disk filled up on the way.
    """
    final = Path(output_dir).absolute()
    run = RunFolder(final, record)
    if final.exists() and not is_run(final) and (final.is_file() or any(final.iterdir())):
        raise UsageError(f"{output_dir} exists and is not a run of tunevax; choose another --output-dir")
    if is_run(final) and not overwrite:
        again = " --resume" if run.path.exists() else ""
        raise UsageError(
            f"{output_dir} is a finished run; choose another --output-dir, or pass --overwrite{again} to replace it"
        )
    if not is_main_process():
        yield run
        return
    fresh = not run.path.exists()
    missing = [p for p in (run.path, *run.path.parents) if not p.exists()]
    if not fresh and not resume:
        again = " --overwrite" if overwrite else ""
        raise UsageError(f"{run.path} is an unfinished run; continue it with --resume{again}, or delete it")
    try:
        run.checkpoints.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = "no permission to write" if isinstance(error, PermissionError) else f"{error.strerror}: cannot create"
        raise UsageError(f"{why} {output_dir}; choose another --output-dir") from error
    try:
        _same_config(run)
        started, clock = datetime.now(UTC), time.monotonic()
        if not fresh:
            record["resumed"] = True
        yield run
        run.record.update(
            schema=SCHEMA,
            name=final.name,
            versions=versions(),
            hardware=hardware(),
            started=started.isoformat(timespec="seconds"),
            wall_seconds=round(time.monotonic() - clock, 3),
            peak_memory_bytes=run.record.get("peak_memory_bytes") or peak_memory(),
        )
        (run.path / "run.json").write_text(json.dumps(run.record, indent=1, default=str) + "\n")
        (run.path / "README.md").write_text(card(run.record))
        if (run.path / "adapter").is_dir():  # in place of PEFT's empty form
            (run.path / "adapter" / "README.md").write_text(card(run.record))
        shutil.rmtree(run.checkpoints)
        (run.path / "config.json").unlink()
        if final.exists():
            shutil.rmtree(final)
        run.path.rename(final)
    except OSError as error:
        _discard(run, missing, keep=True)  # hours of training are worth a checkpoint
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UsageError(
                f"no space left to write {output_dir}; free some, or choose another --output-dir"
            ) from error
        if isinstance(error, PermissionError) or error.errno in (errno.EROFS, errno.EACCES):
            raise UsageError(f"no permission to write {output_dir}; choose another --output-dir") from error
        raise
    except BaseException as error:
        _discard(run, missing, keep=not isinstance(error, UsageError))
        raise


def _same_config(run: RunFolder) -> None:
    """A resumed run must be asked for the same thing; the first call leaves the record to compare with."""
    path = run.path / "config.json"
    asked = {k: run.record.get(k) for k in ("verb", "method", "config")}
    asked["data"] = [entry.get("hash") for entry in run.record.get("data") or []]
    now = json.loads(json.dumps(asked, default=str))
    if not path.exists():
        path.write_text(json.dumps(now))
        return
    before = json.loads(path.read_text())
    if (before["verb"], before["method"]) != (now["verb"], now["method"]):
        raise UsageError(
            f"{run.path} was started by {before['verb']} {before['method']}; delete it or choose another --output-dir"
        )
    if before.get("data", now["data"]) != now["data"]:
        raise UsageError(f"the data changed since {run.path} was started; put it back, or delete the unfinished run")
    differing = [k for k, v in now["config"].items() if before["config"].get(k) != v]
    if differing:
        key = differing[0]
        raise UsageError(
            f"{run.path} was started with {key}={before['config'].get(key)!r}, not {now['config'][key]!r}; "
            "resume with the same options, or delete it"
        )


def _discard(run: RunFolder, created: list[Path], keep: bool = False) -> None:
    """Remove what a failed run created, unless `keep` and there is something to resume from."""
    if run.path not in created or (keep and any(file for name in FINISHED for file in run.path.glob(name))):
        return
    shutil.rmtree(run.path, ignore_errors=True)
    for parent in created[1:]:
        with suppress(OSError):
            parent.rmdir()


def is_main_process() -> bool:
    """Whether this is the process that writes and prints, under a launcher or without one."""
    return os.environ.get("RANK", "0") == "0"


def require_one_process(what: str) -> None:
    """Raise a UsageError if `what` was started by a launcher with several processes."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(f"{what} runs in one process; start it without a launcher")


def is_run(path: str | Path) -> bool:
    """Whether a folder is a complete run."""
    return (Path(path) / "run.json").is_file()


def read_run(path: str | Path) -> dict[str, Any]:
    """run.json of a run folder.

    Raises:
        UsageError: it is broken, or of a newer schema.
    """
    file = Path(path) / "run.json"
    try:
        record = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} cannot be read as JSON; the run folder is damaged") from error
    if record.get("schema", 0) > SCHEMA:
        raise UsageError(f"{path} has schema {record['schema']} and this tunevax reads up to {SCHEMA}; upgrade tunevax")
    return record


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file that tunevax wrote."""
    text = path.read_text(encoding="utf-8")  # not splitlines: model output may hold U+2028
    return [json.loads(line) for line in text.split("\n") if line]


def digest(value: Any) -> str:
    """16 hexadecimal digits of the SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def data_entry(role: str, source: str, rows: Sequence[dict]) -> dict[str, Any]:
    """What run.json says of one dataset: of alignment data also its categories, None where rows have none; of data that
    was read from a file or the hub also how many rows were read as what."""
    content = [{k: v for k, v in row.items() if k not in ("place", "read_as")} for row in rows]
    read_as = Counter(row["read_as"] for row in rows if row.get("read_as"))
    categories = sorted({row["category"] for row in rows if row.get("category")}) or None
    return {
        "role": role,
        "source": source,
        "rows": len(rows),
        "distinct": len({digest(r) for r in content}),
        "hash": digest(content),
        **({"categories": categories} if role == "alignment" else {}),
        **({"read_as": dict(read_as)} if read_as else {}),
    }


def versions() -> dict[str, str]:
    """Versions of tunevax, Python and the libraries that decide numbers."""
    from importlib.metadata import version

    libraries = ("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "numpy")
    return {"tunevax": __version__, "python": platform.python_version(), **{n: version(n) for n in libraries}}


def hardware() -> dict[str, Any]:
    """Processor, cores, memory and accelerator."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "gpu": gpu,
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
    }


def peak_memory() -> int:
    """Bytes: the device allocator's peak where there is an accelerator, else this process's largest resident size."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return 0
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024


def card(record: dict[str, Any]) -> str:
    """The model card of a run, in Markdown."""
    import jinja2

    text = Path(__file__).with_name("card.md.j2").read_text(encoding="utf-8")
    return jinja2.Environment(trim_blocks=True, autoescape=False).from_string(text).render({"model": {}, **record})


def stop_on(error: Exception) -> TunevaxError | None:
    """The tunevax error for a library's error that the user can act on, or None."""
    if isinstance(error, TunevaxError):
        return error
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        return RunError("out of memory; lower --per-device-train-batch-size or use --checkpoint-blocks all")
    return None
