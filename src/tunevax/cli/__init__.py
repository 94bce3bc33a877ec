"""The command line, `tunevax VERB METHOD --option value`: errors of one sentence, and exit codes."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from tunevax import __version__
from tunevax.cli.verbs import VERBS, overview
from tunevax.errors import TunevaxError, stop_on, unknown
from tunevax.quiet import hush


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 1 for a failed run, 2 for a wrong invocation, 130 if interrupted, 143
    if terminated."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # `>&-`
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - for good
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a locale without `·` must not end a run
    if argv is None:
        signal.signal(signal.SIGTERM, _terminate)
    code = 0
    try:
        code = _run(arguments)
    except BrokenPipeError:  # `tunevax ... | head`
        pass
    except KeyboardInterrupt as stop:
        if argv is None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # no traceback on the way out
        word, code = ("terminated", 143) if isinstance(stop, _Terminated) else ("interrupted", 130)
        _say(f"tunevax: {word}{f'; {stop}' if str(stop) else ''}")
    finally:
        code = _flush(code)
    return code


def _run(arguments: list[str]) -> int:
    """Run the command and return the exit code; errors are printed in one sentence."""
    verb, *rest = [a for a in arguments if a != "--debug"] or ["--help"]
    hush()
    try:
        if verb in ("--help", "-h", "help"):
            print(overview())
        elif verb in ("--version", "-V"):
            print(__version__)
        elif verb in VERBS:
            VERBS[verb].run(rest)
        else:
            raise unknown("verb", verb, VERBS)
    except Exception as error:
        if "--debug" in arguments or (isinstance(error, BrokenPipeError) and _nobody_reads()):
            raise
        first = (str(error).strip().splitlines() or ["no message"])[0]
        unexpected = f"{type(error).__name__}: {first} (run again with --debug for the traceback)"
        known = stop_on(error) or TunevaxError(unexpected)
        _say(f"tunevax: {known}")
        return known.exit_code
    return 0


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which batch systems send at the time limit; it unwinds as Ctrl-C does."""


def _terminate(*_: object) -> NoReturn:
    raise _Terminated


def _say(line: str) -> None:
    """Print a line on stderr, if that is open."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def _nobody_reads() -> bool:
    """Whether stdout, and no other pipe of the program, has lost its reader."""
    import select

    if not hasattr(select, "poll"):  # Windows
        return True
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _flush(code: int) -> int:
    """Flush stdout and return the exit code. Output that cannot be written is discarded, or the exit would fail."""
    try:
        sys.stdout.flush()
    except OSError as error:
        with contextlib.suppress(OSError, ValueError), open(os.devnull, "w", encoding="utf-8") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            _say(f"tunevax: stdout cannot be written: {error.strerror}")
            return code or 1
    return code
