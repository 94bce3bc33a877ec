"""The two ways in which tunevax stops on purpose, and the sentence that helps with a misspelled name."""

import difflib
from collections.abc import Iterable
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


def nearby(name: str, *more: str) -> str:
    """ "; did you mean ...?" for what lies in the working directory (or is in `more`) and is spelled almost like `name`;
    else nothing."""
    here = [path.name for path in Path().iterdir() if not path.name.startswith(".")]
    near = difflib.get_close_matches(name, [*here, *more], n=1, cutoff=0.7)
    return f"; did you mean '{near[0]}'?" if near else ""
