"""The command as a process among others: pipes, signals, locales, and what libraries say."""

import ast
import logging
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import tunevax.cli as cli
from tunevax.quiet import hush

SOURCES = Path(cli.__file__).parent
PYTHON = [sys.executable, "-m", "tunevax"]
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["align"], ["report", "--help"], ["plan"]])
@pytest.mark.parametrize("buffered", [True, False])
def test_a_reader_that_leaves_early_is_no_error(arguments, buffered):
    reads, writes = os.pipe()
    os.close(reads)
    environment = {**os.environ, "PYTHONUNBUFFERED": "" if buffered else "1"}
    done = subprocess.run([*PYTHON, *arguments], stdout=writes, stderr=subprocess.PIPE, env=environment, text=True)
    os.close(writes)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_behind_stdout_is_one_sentence():
    with open("/dev/full", "w") as full:
        for unbuffered in ("", "1"):
            environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
            done = subprocess.run(
                [*PYTHON, "--version"], stdout=full, stderr=subprocess.PIPE, env=environment, text=True
            )
            assert done.returncode == 1 and done.stderr.startswith("tunevax: ") and done.stderr.count("\n") == 1
            assert "no space left" in done.stderr.lower()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "word", "code"), [(signal.SIGINT, "interrupted", 130), (signal.SIGTERM, "terminated", 143)]
)
def test_a_signal_ends_in_one_line(number, word, code):
    script = (
        "import sys, time, tunevax.cli as cli\n"
        "def slow(arguments): print('ready', flush=True); time.sleep(60)\n"
        "cli.VERBS['align'] = cli.VERBS['align']._replace(run=slow); sys.argv = ['tunevax', 'align']\n"
        "sys.exit(cli.main())"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # what a shell starts in the background ignores SIGINT
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.communicate(timeout=30) == ("", f"tunevax: {word}\n") and process.returncode == code


def test_what_an_interrupted_run_left_is_said(monkeypatch, capsys):
    def stop(_):
        raise KeyboardInterrupt("the same command with --resume goes on")

    monkeypatch.setitem(cli.VERBS, "align", cli.VERBS["align"]._replace(run=stop))
    assert cli.main(["align"]) == 130
    assert capsys.readouterr().err == "tunevax: interrupted; the same command with --resume goes on\n"


def test_an_ascii_locale_prints_what_it_can():
    script = (
        "import sys, tunevax.cli as cli\n"
        "def say(arguments): print('95 % \\u00b7 \\u00d7'); print('\\u00b7', file=sys.stderr)\n"
        "cli.VERBS['align'] = cli.VERBS['align']._replace(run=say); sys.argv = ['tunevax', 'align']; sys.exit(cli.main())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, **ASCII})
    assert (done.returncode, done.stdout, done.stderr) == (0, "95 % ? ?\n", "?\n")


def test_every_text_file_is_opened_as_utf8():
    """An ASCII or Windows locale would otherwise decide what a file means."""
    for path in SOURCES.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            given = any(k.arg == "encoding" for k in node.keywords) or (name == "read_text" and node.args)
            binary = any(isinstance(a, ast.Constant) and isinstance(a.value, str) and "b" in a.value for a in node.args)
            if name in ("read_text", "write_text") or (name == "open" and not binary):
                assert given, f"{path}:{node.lineno} gives no encoding"


def test_libraries_are_silent_and_errors_are_not(capsys, monkeypatch):
    monkeypatch.setattr(sys, "warnoptions", [])
    with warnings.catch_warnings():
        hush()
        for kind in (UserWarning, RuntimeWarning, FutureWarning, DeprecationWarning):
            warnings.warn("asks nothing", kind, stacklevel=1)
    logger = logging.getLogger("a.library.that.has.no.handler")
    logger.propagate = False
    logger.warning("Failed to load a kernel")
    logger.error("this is wrong")
    assert capsys.readouterr().err == "this is wrong\n"


def test_a_worker_of_an_audit_is_silent_before_it_imports_anything():
    script = (
        "import logging, multiprocessing, sys\n"
        "multiprocessing.parent_process = lambda: 'the audit'\n"
        "import tunevax.audit\n"
        "print(logging.getLogger('bitsandbytes').level, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == f"{logging.ERROR} False\n"


def test_importing_tunevax_silences_one_warning_and_imports_no_library():
    """From Python, without the command line: the warning of a missing kernel, and nobody else's."""
    code = (
        "import logging, sys, warnings; filters = list(warnings.filters); import tunevax; "
        "assert not {'torch', 'transformers', 'bitsandbytes', 'numpy'} & set(sys.modules); "
        "assert warnings.filters == filters; "
        "logging.getLogger('bitsandbytes.backends.cpu.ops').warning('Failed to load CPU gemm_4bit_forward'); "
        "logging.getLogger('transformers').warning('mine')"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "mine\n")
