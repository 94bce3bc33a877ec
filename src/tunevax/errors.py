"""The errors of tunevax, and what errors of libraries mean to the user."""

from __future__ import annotations

import difflib
import errno
import math
import os
from collections.abc import Collection, Iterable
from pathlib import Path


class TunevaxError(Exception):
    """An error the user can act on: shown as one sentence, without a traceback unless `--debug`."""

    exit_code = 1


class UsageError(TunevaxError):
    """The invocation or its input is wrong; nothing was run. Exit code 2."""

    exit_code = 2


class RunError(TunevaxError):
    """A run that started correctly had to stop (a loss is not finite, the disk is full). Exit code 1."""


def unknown(kind: str, name: str, known: Iterable[str]) -> UsageError:
    """The error for an unknown `kind` (method, task, judge, option) called `name`, with the nearest known one."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean '{near[0]}'?" if near else f"; known: {', '.join(known)}" if len(known) <= 20 else ""
    return UsageError(f"unknown {kind} '{name}'{hint}")


def require(
    options: object, *names: str, at_least: float | None = None, above: float | None = None,
    at_most: float | None = None, below: float | None = None, meaning: str = "",
) -> None:  # fmt: skip
    """Raise `UsageError` unless each option is a finite number in the bounds, or None; `meaning` explains a name."""
    bounds = {"at least": at_least, "above": above, "at most": at_most, "below": below}
    for name, value in ((n, getattr(options, n)) for n in names if getattr(options, n) is not None):
        inside = (at_least is None or value >= at_least) and (above is None or value > above)
        inside = inside and (at_most is None or value <= at_most) and (below is None or value < below)
        if not (math.isfinite(value) and inside):
            words = " and ".join(f"{word} {bound}" for word, bound in bounds.items() if bound is not None)
            if at_least is not None and at_most is not None:
                words = f"between {at_least} and {at_most}"
            elif isinstance(value, float) and at_most is None and below is None:
                words = f"a finite number, {at_least} or more" if above is None else f"a finite number {words}"
            raise UsageError(f"{name}{f', {meaning},' if meaning else ''} is {value}; it must be {words}")


def require_one_of(options: object, **known: Collection[str]) -> None:
    """Raise `UsageError` unless each of these options has one of its known values."""
    for name, values in known.items():
        if getattr(options, name) not in values:
            raise unknown(name, getattr(options, name), values)


def shortened(error: Exception) -> str:
    """The message of a library's error on one line, at most 200 characters, or its type if it is empty."""
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


def out_of_memory(error: BaseException) -> bool:
    """Whether Python, torch or a driver ran out of memory."""
    return isinstance(error, MemoryError) or "out of memory" in str(error).lower()


def nearby(name: str, *more: str) -> str:
    """'; did you mean ...?' with the nearest name in the folder of the path `name`, or in `more`; or an empty text."""
    path = Path(name)
    there = [p.name for p in path.parent.iterdir() if not p.name.startswith(".")] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, [*there, *more], n=1, cutoff=0.7)
    return f"; did you mean '{near[0] if near[0] in more else path.parent / near[0]}'?" if near else ""


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)
SAID = {
    "no space left": ("no space left", "disk quota exceeded", "file too large", "PytorchStreamWriter failed",
                      "file write failed", "inline_container", *(f"os error {n})" for n in FULL)),
    "no permission": ("permission denied", "read-only file system", *(f"os error {n})" for n in DENIED)),
}  # fmt: skip
"""The messages of libraries without an errno."""


def not_written(error: BaseException, folder: Path | None = None) -> str | None:
    """`no space left to write` or `no permission to write`, if a run failed for that; None for any other error.
    A permission counts if it concerns a file in `folder`."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in FULL:
            return "no space left to write"
        if isinstance(seen, OSError) and seen.errno in DENIED:
            names = [str(n) for n in (seen.filename, seen.filename2) if n is not None]
            if not names or (folder and any(Path(os.path.abspath(n)).is_relative_to(folder.parent) for n in names)):
                return "no permission to write"
        elif not isinstance(seen, OSError | TunevaxError):
            text = str(seen).lower()
            for what, words in SAID.items():
                if any(word.lower() in text for word in words):
                    return f"{what} to write"
        seen = seen.__cause__ or seen.__context__
    return None


def stop_on(error: Exception) -> TunevaxError | None:
    """The tunevax error for a library's error that the user can act on, or None."""
    if isinstance(error, TunevaxError):
        return error
    if out_of_memory(error):
        return RunError("out of memory; lower --per-device-train-batch-size or use --checkpoint-blocks all")
    if why := not_written(error):
        return RunError(f"{why} {getattr(error, 'filename', None) or 'a file'}; fix that and run the command again")
    return None
