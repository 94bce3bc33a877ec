"""What a person sees of a long run without a terminal, and with one."""

import re
import time
from types import SimpleNamespace

import pytest
from rich.progress import Progress

from tunevax import console as progress
from tunevax.console import Lines, as_bytes, as_time, bar, console
from tunevax.modeling.trainer import ProgressCallback


@pytest.fixture
def fast(monkeypatch):
    """Lines every few hundredths of a second instead of every ten seconds."""
    monkeypatch.setattr(progress, "SHORTEST", 0.05)
    monkeypatch.setattr(progress, "LONGEST", 0.05)
    monkeypatch.setattr(progress, "SOON", 0.01)
    monkeypatch.setattr(console, "quiet", False)
    monkeypatch.setattr(Lines, "first", None)
    monkeypatch.setattr(Lines, "open", [])


def test_lines_say_where_a_training_is_and_keep_their_distance(fast, capsys):
    callback, state = (
        ProgressCallback("align sft"),
        SimpleNamespace(is_world_process_zero=True, max_steps=40, global_step=8),
    )
    started = time.monotonic()
    callback.on_train_begin(None, state, None)
    for _ in range(10):
        time.sleep(0.02)
        state.global_step += 1
        callback.on_step_end(None, state, None)
        callback.on_log(None, state, None, {"loss": 0.5})
    callback.progress.stop()
    first, *lines = capsys.readouterr().err.splitlines()
    assert first == "align sft resumes at step 8 of 40"
    assert 2 <= len(lines) <= (time.monotonic() - started) / 0.05
    place, loss, rate, left = lines[-1].split(", ")
    assert place.startswith("align sft: step 1") and place.endswith("/40") and loss == "loss 0.500"
    assert 5 < float(rate.removesuffix(" steps/s")) < 50.1 and left.endswith(" left")  # not counting the 8 before
    time.sleep(0.12)
    assert capsys.readouterr().err == ""


def test_one_line_for_what_is_open_one_in_the_other(fast, capsys):
    with bar() as outer, bar() as inner:
        outer.add_task("audit", total=4, completed=1, note="")
        inner.add_task("generate", total=None, note="aloud")
        time.sleep(0.12)
    lines = capsys.readouterr().err.splitlines()
    assert lines and all(re.fullmatch(r"audit 1/4, .* left; generate 0, aloud, 0:00 so far", line) for line in lines)


def test_a_step_that_takes_long_shows_that_it_is_alive(fast, capsys):
    with bar() as shown:
        shown.add_task("slow", total=2, note="")
        time.sleep(0.3)
    assert len(capsys.readouterr().err.splitlines()) >= 3


def test_the_time_between_lines_is_ten_seconds_at_first_and_less_than_a_minute_later(monkeypatch):
    for passed, gap in ((0, 10), (50, 10), (300, 30), (36000, 50)):
        monkeypatch.setattr(Lines, "first", time.monotonic() - passed)
        monkeypatch.setattr(Lines, "last", time.monotonic())
        monkeypatch.setattr(Lines, "opened", 0.0)
        assert progress._next() - Lines.last == pytest.approx(gap, abs=0.1)


def test_nothing_on_other_ranks_or_while_the_console_is_quiet(fast, capsys, monkeypatch):
    monkeypatch.setattr(console, "quiet", True)
    with bar() as shown:
        shown.add_task("cell", total=1, note="")
        time.sleep(0.1)
    monkeypatch.setattr(console, "quiet", False)
    monkeypatch.setenv("RANK", "1")
    with bar() as shown:
        shown.add_task("cell", total=1, note="")
        time.sleep(0.1)
    assert capsys.readouterr().err == ""


def test_a_terminal_has_its_bar(monkeypatch):
    monkeypatch.setattr(console, "_force_terminal", True)
    assert type(bar()) is Progress


def test_a_training_that_fails_closes_its_bar(fast, tmp_path):
    import torch
    from tiny import TinyTokenizer, rows, tiny_llama

    from tunevax.modeling.trainer import ResponseTrainer, TrainConfig

    shown = ProgressCallback("x")
    args = TrainConfig(str(tmp_path), max_steps=3, save_strategy="no", use_cpu=True, report_to="none")
    trainer = ResponseTrainer(tiny_llama(2), args, rows("safe"), TinyTokenizer(), [shown])
    trainer.require_finite = lambda loss: torch.zeros(1)[2]
    with pytest.raises(IndexError):
        trainer.train()
    assert shown.progress.closed.is_set() and Lines.active == []


def test_a_reader_that_leaves_stops_the_display_and_not_the_run(monkeypatch):
    class Gone:
        def write(self, _):
            raise BrokenPipeError

        flush = write

    monkeypatch.setattr(console, "quiet", False)  # restored, whatever the broken pipe makes of it
    monkeypatch.setattr(console, "_file", Gone())
    console.print("x")
    assert console.quiet


@pytest.mark.slow
def test_what_is_over_soon_gets_no_line_and_neither_does_nothing(fast, capsys, monkeypatch):
    monkeypatch.setattr(progress, "SOON", 0.9)
    for _ in range(3):  # one after the other, in a process that last wrote long ago
        with bar() as shown:
            shown.add_task("short", total=1, note="")
            time.sleep(0.1)
    with bar():  # nothing in it
        time.sleep(1.1)
    assert capsys.readouterr().err == ""
    with bar() as shown:
        shown.add_task("long", total=1, note="")
        time.sleep(1.4)
    assert "long" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0158, "15.8 ms"), (0.9996, "1.0 s"), (9.46, "9.5 s"), (42.4, "42 s"), (242, "4 min 2 s"), (7500, "2 h 5 min")],
)
def test_seconds_as_text(seconds, text):
    assert as_time(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (12, "12 bytes"),
        (2765, "2.7 KiB"),
        (900 * 2**20, "900.0 MiB"),
        (5 * 2**28, "1.25 GiB"),
        (None, "of unknown size"),
    ],
)
def test_bytes_as_text(size, text):
    assert as_bytes(size) == text
