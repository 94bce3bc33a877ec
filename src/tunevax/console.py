"""Progress on the main process: a bar on a terminal, and an occasional line where stderr is a file or a pipe."""

from __future__ import annotations

import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import ClassVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeRemainingColumn

from tunevax.environment import is_main_process

SHORTEST, LONGEST = 10.0, 50.0
"""Seconds between two lines without a terminal: the shortest at first, then a tenth of the elapsed time."""
SOON = 2.0
"""Seconds before the first line: shorter tasks need none."""


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """The reader of stderr has left (`2>&1 | head`): nothing more is shown, and the run goes on."""
        self.quiet = True


console = _Console(stderr=True)


def bar() -> Progress:
    """A transient bar on stderr, or occasional lines if that is no terminal; nothing on other ranks."""
    if not console.is_terminal or not is_main_process():
        return Lines()
    before, after = TextColumn("{task.description}"), TextColumn("{task.fields[note]}")
    columns = (before, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), after)
    return Progress(*columns, console=console, transient=True)


class Lines(Progress):
    """A `Progress` that writes lines: `align sft: step 30/1280, loss 0.512, 3.1 steps/s, 6:42 left`. One thread writes
    for all that are open, the outer ones first, also during a step of ten minutes."""

    active: ClassVar[list[Lines]] = []
    opened: ClassVar[float] = 0.0  # when the outermost of these was opened
    first: ClassVar[float | None] = None  # when the first of this process was opened
    last: ClassVar[float] = 0.0  # when the last line was written

    def __init__(self) -> None:
        super().__init__(console=console, disable=True)
        self.closed = threading.Event()

    def start(self) -> None:
        """Start counting."""
        if console.quiet or not is_main_process() or self in self.active:
            return
        if Lines.first is None:
            Lines.first = Lines.last = time.monotonic()
        self.closed.clear()
        self.active.append(self)
        if len(self.active) == 1:
            Lines.opened = time.monotonic()
            threading.Thread(target=self._write, daemon=True).start()

    def stop(self) -> None:
        """Write no more."""
        self.closed.set()
        with suppress(ValueError):
            self.active.remove(self)

    def _write(self) -> None:
        """Until the outermost is closed."""
        while not self.closed.wait(max(0.0, _next() - time.monotonic())):
            text = "; ".join(_line(task) for lines in list(self.active) for task in lines.tasks)
            if not text:  # nothing has begun yet
                Lines.opened = time.monotonic()
            elif time.monotonic() >= _next():
                Lines.last = time.monotonic()
                with suppress(OSError, ValueError):  # stderr is closed
                    print(text, file=sys.stderr, flush=True)


def _next() -> float:
    """When the next line is due."""
    gap = min(LONGEST, max(SHORTEST, (time.monotonic() - (Lines.first or 0.0)) / 10))
    return max(Lines.last + gap, Lines.opened + SOON)


def _line(task: Task) -> str:
    """The position of a task, its note, its rate, and the time left."""
    unit, note = task.fields.get("unit", ""), task.fields.get("note", "")
    done = task.completed - task.fields.get("begun", 0)
    place = f"{task.completed:g}" if task.total is None else f"{task.completed:g}/{task.total:g}"
    parts = [f"{task.description}{f': {unit}' if unit else ''} {place}", *([note] if note else [])]
    elapsed = task.elapsed or 0.0
    if done > 0 and elapsed > 0:
        rate = done / elapsed
        parts.append(f"{rate:.2g} {unit}s/s".replace(" s/s", "/s") if rate >= 1 else f"{1 / rate:.3g} s each")
        if task.total is not None:
            parts.append(f"{_clock((task.total - task.completed) / rate)} left")
    else:
        parts.append(f"{_clock(elapsed)} so far")
    return ", ".join(parts)


def _clock(seconds: float) -> str:
    """1:02:33, or 2:33 below an hour."""
    text = str(timedelta(seconds=round(max(0.0, seconds))))
    return text.removeprefix("0:").removeprefix("0") if text.startswith("0:") else text


def as_time(seconds: float | None) -> str:
    """'15.8 ms', '9.5 s', '4 min 2 s', '2 h 5 min'."""
    if seconds is None:
        return "an unknown time"
    if seconds < 0.9995:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def as_bytes(size: float | None) -> str:
    """'12 bytes', '2.7 KiB', '1.25 GiB'."""
    if size is None:
        return "of unknown size"
    if size >= 2**30:
        return f"{size / 2**30:.2f} GiB"
    if size >= 2**20:
        return f"{size / 2**20:.1f} MiB"
    return f"{size / 2**10:.1f} KiB" if size >= 2**10 else f"{size:.0f} bytes"
