"""The run folder, which every verb writes and `--model` accepts.

A run is written to `OUT.partial` and renamed to `OUT` when it is complete, so a folder `OUT` with a run.json is whole.
A run that was killed leaves `OUT.partial` with its checkpoints, and the same command with `--resume` continues it. If
`OUT` exists and is not a run, or cannot be renamed (a mount point), the run is written to `OUT/.partial` instead, whose
content moves up at the end, run.json last.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import stat
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

from tunevax.environment import hardware, is_main_process, peak_memory, versions
from tunevax.errors import DENIED, RunError, UsageError, not_written
from tunevax.lineage import Lineage
from tunevax.records import LOG, PROMPTS, RUN, SCHEMA, RunRecord, is_run, read_object, read_prompts
from tunevax.run_lock import RunLock, refuse_if_held

CHECKPOINTS = ("checkpoints/checkpoint-*", "checkpoints/*/checkpoint-*")
"""Checkpoints of training; those of each seed of a curation have a folder of their own."""
FINISHED = (*CHECKPOINTS, "checkpoints/**/done.json", "*.done.json", "cells/*.json")
"""The files from which an unfinished run can continue, with finished targets of an attack and cells of an audit."""
SCRATCH = ("checkpoints", "config.json", "lock")
"""Files of an unfinished run beside its content; removed when it is complete."""
INSIDE = ".partial"
"""The folder of an unfinished run inside its output folder."""
NOT_OURS = ("lost+found",)
"""Files in the root of a file system."""


class RunFolder:
    """A run being written into `path`, `OUT.partial` or `OUT/.partial`, which is called `final` when complete, `OUT`;
    `record` is the content of run.json, and the verb fills it."""

    def __init__(self, final: Path, record: RunRecord) -> None:
        self.final, self.path, self.record = final, partial_of(final), record

    @property
    def checkpoints(self) -> Path:
        """The trainer's checkpoints, which a resume needs; removed when the run is complete."""
        return self.path / "checkpoints"

    def write_lines(self, name: str, rows: Iterable[Mapping[str, object]]) -> None:
        """Write a JSONL file."""
        # A lone surrogate, which UTF-8 cannot hold, becomes its JSON escape.
        with (self.path / name).open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def record_prompts(folder: Path, **roles: Iterable[str]) -> None:
    """Add prompt hashes to prompts.json in `folder`, by role."""
    known = read_prompts(folder)
    for role, more in roles.items():
        known[role] = sorted({*known.get(role, []), *more})
    (folder / PROMPTS).write_text(json.dumps(known), encoding="utf-8")


def partial_of(final: Path) -> Path:
    """Where the run `final` is written until it is complete."""
    place = final.resolve()
    beside, inside = place.with_name(place.name + ".partial"), place / INSIDE
    if inside.is_dir():
        return inside
    if not place.is_dir() or beside.exists() or (is_run(place) and _can_be_renamed(place)):
        return beside
    return inside


def _can_be_renamed(folder: Path) -> bool:
    """Whether a folder may be replaced: it is not a mount point, and its parent is writable for this user."""
    mounts = Path("/proc/self/mountinfo")  # also knows a folder bound from the same disk
    points = mounts.read_text(encoding="utf-8", errors="replace").split("\n") if mounts.exists() else []
    if os.path.ismount(folder) or any(line.split(" ")[4:5] == [str(folder)] for line in points):
        return False
    parent, user = folder.parent.stat(), os.geteuid() if hasattr(os, "geteuid") else 0
    sticky = parent.st_mode & stat.S_ISVTX and user not in (0, parent.st_uid, folder.stat().st_uid)
    return os.access(folder.parent, os.W_OK | os.X_OK) and not sticky


@contextmanager
def writing(output_dir: str, record: RunRecord, resume: bool = False, overwrite: bool = False) -> Iterator[RunFolder]:
    """Open a run folder; on success write run.json, rename and tidy up; on failure leave only checkpoints and the
    training log. Whether the run can be written to its end is checked first.

    `output_dir` is OUT: no folder yet, an empty one, or a run if `overwrite` is set. `record` has verb, method, config
    and command, for run.json. `resume` continues the unfinished run if there is one; its config must be the same.

    Raises:
        UsageError: OUT exists, cannot be written, or is being written by another process.
        RunError: it could no longer be written after the start, for example because the disk filled up.
    """
    run = _checked(output_dir, record, overwrite)
    if not is_main_process():
        yield run
        return
    refuse_if_held(run.path)
    begun = run.path.is_dir() and _left(run.path, FINISHED)
    if run.path.exists() and not resume and (begun or not (run.path / "config.json").is_file()):
        again = " --overwrite" if overwrite else ""
        raise UsageError(f"{run.path} is an unfinished run; continue it with --resume{again}, or delete it")
    missing = [p for p in (run.path, *run.path.parents) if not p.exists()]
    lock = None
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        lock = RunLock(run.path)
        if not begun:
            missing = [run.path, *missing] if run.path not in missing else missing
            for entry in list(run.path.iterdir()):  # of a run that was killed before its first checkpoint
                if entry != lock.file:
                    _remove(entry)
        run.checkpoints.mkdir(exist_ok=True)
        _same_config(run)
        _try_to_finish(run.path)
    except BaseException as error:
        if lock is not None or isinstance(error, OSError):
            _discard(run, missing)
        if lock is not None:
            lock.release()
        if isinstance(error, OSError):
            why = "no permission to write" if error.errno in DENIED else f"{error.strerror or error}: cannot create"
            raise UsageError(f"{why} {output_dir}; choose another --output-dir") from error
        raise
    try:
        started, clock = datetime.now(UTC), time.monotonic()
        if begun:
            record["resumed"] = True
        yield run
        measured: RunRecord = {
            "versions": versions(), "hardware": hardware(), "started": started.isoformat(timespec="seconds"),
            "wall_seconds": round(time.monotonic() - clock, 3), "peak_memory_bytes": peak_memory(),
        }  # fmt: skip
        own = {name: value for name, value in run.record.items() if value}  # `judge` keeps those of the run it judges
        run.record |= cast(RunRecord, {**measured, **own, "schema": SCHEMA, "name": run.final.name})
        if not lock.held():
            raise RunError(f"{run.path} was taken over by another process, which is writing it now")
        for folder in filter(Path.is_dir, (run.path, run.path / "adapter")):  # there in place of PEFT's empty form
            (folder / "README.md").write_text(card(run.record), encoding="utf-8", errors="replace")
        content = json.dumps(run.record, indent=1, default=str) + "\n"
        (run.path / RUN).write_text(content, encoding="utf-8")
        _finish(run)
        lock.release(run.final)
    except BaseException as error:
        kept = _discard(run, missing, CHECKPOINTS if isinstance(error, UsageError) else (*FINISHED, LOG))
        lock.release()
        how = "the same command" if record["verb"] == "audit" else "the same command with --resume"
        on = f"{how} goes on from what is in {run.path}" if kept and _left(run.path, FINISHED) else ""
        if isinstance(error, KeyboardInterrupt) and on and not error.args:
            error.args = (on,)
        if isinstance(error, Exception) and (full := not_written(error, run.path)):
            raise RunError(f"{full} {output_dir}; fix that, and {on or 'run it again'}") from error
        raise


def _checked(output_dir: str, record: RunRecord, overwrite: bool) -> RunFolder:
    """The run folder; a `UsageError` if it cannot be written there."""
    if not str(output_dir).strip():
        raise UsageError("--output-dir is empty; name a folder")
    try:
        final = Path(output_dir).expanduser().absolute()
        place = final.resolve()
        there = [p.name for p in place.iterdir() if p.name not in NOT_OURS] if place.is_dir() else []
        if (place.exists() and not place.is_dir()) or place == place.parent:
            raise UsageError(f"{output_dir} exists and is not a run of tunevax; choose another --output-dir")
        run = RunFolder(final, record)
        run.path.exists()  # a name that is too long for it
    except PermissionError as error:
        raise UsageError(f"no permission to look into {output_dir}; choose another --output-dir") from error
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name with a zero byte, a name too long
        why = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UsageError(f"{why}: cannot create {output_dir}; choose another --output-dir") from error
    if is_run(place):
        if not overwrite:
            how = f"pass --overwrite{' --resume' if run.path.exists() else ''} to replace it"
            raise UsageError(f"{output_dir} is a finished run; choose another --output-dir, or {how}")
        _refuse_to_lose(run, place)
    elif there and INSIDE not in there:
        raise UsageError(f"{output_dir} exists and is not a run of tunevax; choose another --output-dir")
    return run


def _refuse_to_lose(run: RunFolder, place: Path) -> None:
    """Raise `UsageError` if the run to be replaced is what the new one starts from, or is compared with."""
    for name, value in run.record.get("config", {}).items():
        refs = [ref for ref in (value if isinstance(value, list) else [value]) if isinstance(ref, str) and ref]
        for ref in (ref for ref in refs if "\0" not in ref):
            for before in Lineage.of(ref.partition(":")[0]).history:
                if Path(before.ref).expanduser().absolute().resolve().is_relative_to(place):
                    lost = f"{run.final}, which --{name.replace('_', '-')} {ref} needs"
                    raise UsageError(f"--overwrite would remove {lost}; choose another --output-dir")


def _try_to_finish(folder: Path) -> None:
    """Write and rename a small folder: some network file systems cannot rename one, and a quota shows in writing."""
    trial, renamed = folder / "trial", folder / "trial.renamed"
    try:
        trial.mkdir(exist_ok=True)
        with (trial / "file").open("wb", buffering=0) as file:
            file.write(bytes(2**16))
            os.fsync(file.fileno())
        trial.rename(renamed)
    finally:
        for path in (trial, renamed):
            shutil.rmtree(path, ignore_errors=True)


def _finish(run: RunFolder) -> None:
    """Give a complete run its name. An earlier run of that name is removed when the new one is in its place."""
    place = run.final.resolve()
    old = _unused(place / ".old" if run.path.parent == place else place.with_name(f"{place.name}.old"))
    if run.path.parent == place:
        if earlier := [p for p in place.iterdir() if p != run.path and p.name not in NOT_OURS]:
            old.mkdir()
            for entry in earlier:
                entry.rename(old / entry.name)
        last = ("cells", RUN)  # an audit cannot continue without the former; the latter makes the folder a run
        for entry in sorted(run.path.iterdir(), key=lambda p: last.index(p.name) if p.name in last else -1):
            if entry.name not in SCRATCH:
                entry.rename(place / entry.name)
        _remove(run.path)
    else:
        if place.exists():
            place.rename(old)
        try:
            run.path.rename(place)
        except BaseException:
            if old.exists():
                old.rename(place)
            raise
        for name in SCRATCH[:-1]:
            _remove(place / name)
    if old.exists() and not _remove(old):
        print(f"note: the replaced run could not be removed; it is in {old}", file=sys.stderr)


def _unused(path: Path) -> Path:
    """`path`, or the same name with a number that makes it unused."""
    numbered = (path.with_name(f"{path.name}.{number}") for number in itertools.count(1))
    return next(p for p in itertools.chain([path], numbered) if not os.path.lexists(p))


def _remove(path: Path) -> bool:
    """Remove a file or a folder as far as possible; returns whether it is gone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
    return not os.path.lexists(path)


def _same_config(run: RunFolder) -> None:
    """Raise `UsageError` if a resumed run has other options or data; the first call writes the record to compare."""
    path = run.path / "config.json"
    given = {k: run.record.get(k) for k in ("verb", "method", "config")}
    given["data"] = [entry.get("hash") for entry in run.record.get("data") or []]
    now = json.loads(json.dumps(given, default=str))
    if not path.exists():
        part = path.with_name("config.json.part")
        part.write_text(json.dumps(now), encoding="utf-8")
        part.replace(path)
    try:
        before = read_object(path)
    except UsageError as error:
        raise UsageError(f"{path} cannot be read as a JSON object; delete the unfinished run {run.path}") from error
    if (before["verb"], before["method"]) != (now["verb"], now["method"]):
        by = f"{before['verb']} {before['method']}"
        raise UsageError(f"{run.path} was started by {by}; delete it or choose another --output-dir")
    if before.get("data", now["data"]) != now["data"]:
        raise UsageError(f"the data changed since {run.path} was started; restore it, or delete the unfinished run")
    for key, value in now["config"].items():
        if (first := before["config"].get(key)) != value:
            other = f"{key}={first!r}, not {value!r}"
            raise UsageError(f"{run.path} was started with {other}; resume with equal options, or delete it")


def _left(folder: Path, names: Sequence[str]) -> bool:
    """Whether one of these patterns matches a folder or a file with content."""
    return any(path.is_dir() or path.stat().st_size for name in names for path in folder.glob(name))


def _discard(run: RunFolder, created: list[Path], keep: Sequence[str] = ()) -> bool:
    """Remove the folders that a failed run created, unless a pattern of `keep` matches; whether any is left."""
    if run.path not in created or _left(run.path, keep):
        return True
    shutil.rmtree(run.path, ignore_errors=True)
    for parent in created[1:]:
        with suppress(OSError):
            parent.rmdir()
    return False


def card(record: RunRecord) -> str:
    """The model card of a run, in Markdown."""
    import jinja2

    text = Path(__file__).with_name("card.md.j2").read_text(encoding="utf-8")
    return jinja2.Environment(trim_blocks=True, autoescape=False).from_string(text).render({"model": {}, **record})
