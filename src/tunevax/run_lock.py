"""The lock of a run folder, against two processes that write into it.

The file names the process that holds it, which renews its time. A lock is valid while that process runs, or, seen
from another machine (a shared file system, a container), until it has not been renewed for `STALE` seconds.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tunevax.errors import UsageError

BEAT, STALE = 30.0, 300.0
"""Seconds between two renewals, and without one before a lock of another machine is taken over."""


class RunLock:
    """A lock that this process holds on a folder; a `UsageError` if another process holds it."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "lock"
        self.text = json.dumps(_this_process())
        with _open_alone(self.file) as file:
            refuse_if_held(folder)
            file.seek(0)
            file.truncate()
            file.write(self.text)
            file.flush()
        self.closed = threading.Event()
        threading.Thread(target=self._renew, daemon=True).start()

    def held(self) -> bool:
        """Whether this process still holds it: after a long stop another machine may have taken it over."""
        with suppress(OSError):
            return self.file.read_text(encoding="utf-8") == self.text
        return False

    def release(self, folder: Path | None = None) -> None:
        """Release it; `folder` is its folder if that was renamed."""
        self.closed.set()
        self.file = folder / "lock" if folder else self.file
        if self.held():
            with suppress(OSError):
                self.file.unlink()

    def _renew(self) -> None:
        while not self.closed.wait(BEAT):
            with suppress(OSError):
                os.utime(self.file)


def refuse_if_held(folder: Path) -> None:
    """Raise `UsageError` if a live process holds the lock of `folder`."""
    file = folder / "lock"
    try:
        holder = json.loads(file.read_text(encoding="utf-8"))
        pid, host, machine, started = (holder[k] for k in ("pid", "host", "machine", "started"))
        if machine == _this_process()["machine"] and os.name == "posix":
            if not _lives(pid, started):
                return
            hint = "wait for it"
        else:
            with tempfile.TemporaryFile(dir=folder) as now:  # by the clock of the file system
                if os.fstat(now.fileno()).st_mtime - file.stat().st_mtime > STALE:
                    return
            hint = f"wait for it (once it is gone, its lock is taken over after {STALE / 60:g} minutes)"
    except (OSError, ValueError, KeyError, TypeError):  # no lock, or an incomplete one
        return
    raise UsageError(f"{folder} is being written by process {pid} on {host}; {hint}, or choose another --output-dir")


@contextmanager
def _open_alone(path: Path) -> Iterator[Any]:
    """The file, open for reading and writing, for this process alone where the system can lock files."""
    while True:
        with path.open("a+", encoding="utf-8") as file:
            with suppress(ImportError, OSError):  # Windows; a file system without locks
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX)
            with suppress(FileNotFoundError):  # its holder removed it meanwhile
                if os.stat(path).st_ino == os.fstat(file.fileno()).st_ino:
                    yield file
                    return


def _this_process() -> dict[str, Any]:
    """The content of a lock; `machine` is the system or container whose process number it is."""
    machine = [platform.node()]
    with suppress(OSError):
        machine += [Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()]
        machine += [os.readlink("/proc/self/ns/pid")]
    return {"pid": os.getpid(), "host": platform.node(), "machine": machine, "started": _start_of(os.getpid())}


def _lives(pid: int, started: str | None) -> bool:
    """Whether the process with this number that began at `started` still runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        pass
    now = _start_of(pid)
    return now != "ended" and (None in (now, started) or now == started)


def _start_of(pid: int) -> str | None:
    """When a process began, unlike a later one of the same number; `ended` for a zombie; None if that is not known."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return "ended" if fields[0] == "Z" else fields[19]
