"""The two ways in which tunevax stops on purpose, and what an error of a library means to the user."""

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
    """A run that started correctly had to stop (a loss became NaN, the disk is full). Exit code 1."""


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
    """Raise `UsageError` unless each of these options is a finite number within the bounds, or None.

    Args:
        meaning: what the option is, where its name does not say so.
    """
    bounds = {"at least": at_least, "above": above, "at most": at_most, "below": below}
    for name in names:
        value = getattr(options, name)
        if value is None:
            continue
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
    """Raise `UsageError` unless each option named here has one of the values that are known for it."""
    for name, values in known.items():
        if getattr(options, name) not in values:
            raise unknown(name, getattr(options, name), values)


def shortened(error: Exception) -> str:
    """The message of a library's error on one line, at most 200 characters; its kind where it says nothing."""
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


def out_of_memory(error: BaseException) -> bool:
    """Whether an error is that of Python, torch or a driver for memory that is not there."""
    return isinstance(error, MemoryError) or "out of memory" in str(error).lower()


def nearby(name: str, *more: str) -> str:
    """A question after the nearest name in the folder of the path `name`, or in `more`; empty if none is spelled
    alike."""
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
"""How libraries that are not Python say it."""


def not_written(error: BaseException, folder: Path | None = None) -> str | None:
    """`no space left to write` or the like, if a run failed for that; None for any other error.

    Args:
        folder: a permission counts if it is for a file in here.
    """
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
        return RunError(f"{why} {getattr(error, 'filename', None) or 'a file'}; mend that and run the command again")
    return None
