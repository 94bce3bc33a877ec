"""Two processes and one run folder."""

import json
import os
import subprocess
import sys

import pytest

from tunevax import run_lock
from tunevax.errors import RunError, UsageError
from tunevax.runs import writing

RECORD = {"verb": "x", "method": None, "config": {}}


def begin(out, **changes):
    """What a process leaves that was killed after its first checkpoint, with its lock changed."""
    with pytest.raises(KeyboardInterrupt), writing(str(out), dict(RECORD)) as run:
        (run.checkpoints / "checkpoint-1").mkdir()
        held = json.loads((run.path / "lock").read_text())
        raise KeyboardInterrupt
    assert not (run.path / "lock").exists()
    (run.path / "lock").write_text(json.dumps({**held, **changes}))
    return run.path / "lock"


def test_a_folder_that_is_being_written_is_refused_and_left_alone(tmp_path):
    out = tmp_path / "out"
    with writing(str(out), dict(RECORD)) as run:
        for resume in (False, True):
            with (
                pytest.raises(UsageError, match=f"is being written by process {os.getpid()} on .*; wait for it"),
                writing(str(out), dict(RECORD), resume=resume),
            ):
                raise AssertionError("two at once")
        assert run.checkpoints.is_dir() and (run.path / "lock").exists()
    assert sorted(p.name for p in out.iterdir()) == ["README.md", "run.json"]


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    begin(tmp_path / "out", pid=dead.pid)
    with writing(str(tmp_path / "out"), dict(RECORD), resume=True) as run:
        assert json.loads((run.path / "lock").read_text())["pid"] == os.getpid()
    begin(tmp_path / "again", started="1")  # this number belonged to another process
    with writing(str(tmp_path / "again"), dict(RECORD), resume=True):
        pass
    begin(tmp_path / "torn").write_text('{"pid": 1')
    with writing(str(tmp_path / "torn"), dict(RECORD), resume=True):
        pass


def test_a_lock_of_another_machine_is_good_while_it_is_renewed(tmp_path):
    lock = begin(tmp_path / "out", machine=["elsewhere"], host="elsewhere", pid=1)
    with (
        pytest.raises(UsageError, match="by process 1 on elsewhere; wait for it .once it is gone"),
        writing(str(tmp_path / "out"), dict(RECORD), resume=True),
    ):
        pass
    os.utime(lock, (1, 1))
    with writing(str(tmp_path / "out"), dict(RECORD), resume=True):
        pass
    assert (tmp_path / "out" / "run.json").exists()


def test_a_lock_is_renewed(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT", 0.01)
    lock = run_lock.RunLock(tmp_path)
    os.utime(lock.file, (1, 1))
    for _ in range(500):
        if lock.file.stat().st_mtime > 1:
            break
        lock.closed.wait(0.01)
    assert lock.file.stat().st_mtime > 1
    lock.release()
    assert not lock.file.exists()


def test_a_process_that_lost_its_lock_does_not_finish(tmp_path):
    with (
        pytest.raises(RunError, match="taken over by another process"),
        writing(str(tmp_path / "out"), dict(RECORD)) as run,
    ):
        (run.path / "lock").write_text("{}")
    assert not (tmp_path / "out").exists()


def test_the_ranks_of_a_launcher_share_a_folder(tmp_path, monkeypatch):
    with writing(str(tmp_path / "out"), dict(RECORD)) as first:
        monkeypatch.setenv("RANK", "1")
        with writing(str(tmp_path / "out"), dict(RECORD)) as second:
            assert second.path == first.path
        monkeypatch.delenv("RANK")
    assert (tmp_path / "out" / "run.json").exists()
