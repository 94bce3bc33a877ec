"""The run folder: whole or absent, and never in the way of an earlier one."""

import errno
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tunevax.errors import RunError, UsageError
from tunevax.runs import writing


def test_parents_made_for_a_refused_run_are_removed(tmp_path):
    with (
        pytest.raises(UsageError),
        writing(str(tmp_path / "a" / "b" / "out"), {"verb": "x", "method": None, "config": {}}),
    ):
        raise UsageError("no")
    assert not (tmp_path / "a").exists()


def test_what_a_failed_run_leaves(tmp_path):
    record = {"verb": "x", "method": None, "config": {}}
    for error, left in (
        (UsageError("no"), True),  # whatever happens at the end, checkpoints stay
        (OSError(28, "full"), True),
        (RunError("nan"), True),
        (KeyboardInterrupt(), True),
    ):
        out = tmp_path / type(error).__name__
        with pytest.raises((type(error), RunError)), writing(str(out), record) as run:
            (run.checkpoints / "checkpoint-3").mkdir()
            raise error
        assert run.path.exists() == left, error


def test_another_method_cannot_resume(tmp_path):
    for method, told in (("sft", None), ("vaccine", "was started by align sft")):
        with (
            pytest.raises((KeyboardInterrupt, UsageError), match=told),
            writing(str(tmp_path / "out"), {"verb": "align", "method": method, "config": {}}, resume=True) as run,
        ):
            (run.checkpoints / "checkpoint-3").mkdir(exist_ok=True)
            raise KeyboardInterrupt


def test_a_damaged_unfinished_run_says_what_to_do(tmp_path):
    record = {"verb": "align", "method": "sft", "config": {}}
    with pytest.raises(KeyboardInterrupt), writing(str(tmp_path / "out"), dict(record)) as run:
        (run.checkpoints / "checkpoint-3").mkdir()
        raise KeyboardInterrupt
    for content in ("{", "[]"):
        (run.path / "config.json").write_text(content)
        with (
            pytest.raises(UsageError, match=f"delete the unfinished run {run.path}"),
            writing(str(tmp_path / "out"), dict(record), resume=True),
        ):
            pass


def test_a_failed_overwrite_keeps_the_old_run(tmp_path):
    record = {"verb": "x", "method": None, "config": {}}
    with writing(str(tmp_path / "out"), dict(record)):
        pass
    with pytest.raises(RuntimeError), writing(str(tmp_path / "out"), dict(record), overwrite=True):
        raise RuntimeError
    assert (tmp_path / "out" / "run.json").is_file()


RECORD = {"verb": "x", "method": None, "config": {}}


def content(folder):
    return sorted(p.name for p in folder.iterdir())


def write(out, overwrite=False, resume=False, mark="new", **record):
    with writing(str(out), {**RECORD, **record}, resume, overwrite) as run:
        (run.path / "mark").write_text(mark)
    return run


@pytest.fixture
def volume(tmp_path):
    """A small file system of its own, as a Docker volume or a scratch disk is."""
    place = tmp_path / "volume"
    place.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True)
    if mount.returncode:
        pytest.skip("no right to mount a file system")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_an_output_folder_that_is_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    for name, target in (("empty", "disk"), ("dangling", "nowhere")):
        (tmp_path / name).symlink_to(target)
        run = write(tmp_path / name)
        assert (tmp_path / name).is_symlink() and run.final == tmp_path / name
        assert content(tmp_path / target) == ["README.md", "mark", "run.json"]
        assert json.loads((tmp_path / name / "run.json").read_text())["name"] == name
        write(tmp_path / name, overwrite=True, mark="newer")
        assert (tmp_path / target / "mark").read_text() == "newer" and (tmp_path / name).is_symlink()
    assert content(tmp_path) == ["dangling", "disk", "empty", "nowhere"]


def test_an_output_folder_that_is_a_mount_point(tmp_path, volume):
    (volume / "lost+found").mkdir()
    with pytest.raises(KeyboardInterrupt) as stop, writing(str(volume), dict(RECORD)) as run:
        assert run.path == volume / ".partial"
        (run.checkpoints / "checkpoint-1").mkdir()
        raise KeyboardInterrupt
    assert str(stop.value) == f"the same command with --resume goes on from what is in {run.path}"
    with pytest.raises(UsageError, match="is an unfinished run; continue it with --resume"):
        write(volume)
    write(volume, resume=True)
    assert content(volume) == ["README.md", "lost+found", "mark", "run.json"]
    write(volume, overwrite=True, mark="newer")
    assert content(volume) == ["README.md", "lost+found", "mark", "run.json"]
    assert (volume / "mark").read_text() == "newer" and content(tmp_path) == ["volume"]


def test_a_disk_that_fills_up_ends_in_one_sentence_and_keeps_the_checkpoints(volume):
    import torch
    from safetensors.torch import save_file

    out, much = volume / "out", torch.zeros(2**19)
    ways = {
        "python": lambda path: (path / "x").write_bytes(bytes(2**21)),
        "safetensors": lambda path: save_file({"x": much}, path / "x.safetensors"),
        "torch": lambda path: torch.save(much, path / "x.pt"),
    }
    for name, fill in ways.items():
        with (
            pytest.raises(
                RunError, match=f"^no space left to write {out}; fix that, and the same command with --resume"
            ),
            writing(str(out), dict(RECORD), resume=True) as run,
        ):
            (run.checkpoints / "checkpoint-1").mkdir(exist_ok=True)
            fill(run.path)
        assert (run.checkpoints / "checkpoint-1").is_dir(), name
        for file in run.path.glob("x*"):
            file.unlink()
    write(out, resume=True)
    (volume / "rest").write_bytes(bytes(os.statvfs(volume).f_bavail * os.statvfs(volume).f_bsize))
    with pytest.raises(UsageError, match="No space left on device: cannot create"):  # nothing was run: exit 2
        write(volume / "other")
    assert content(volume) == ["out", "rest"]


def test_a_quota_and_a_limit_on_file_size_are_a_full_disk(tmp_path):
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        inner = OSError(number, os.strerror(number))
        outer = RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")
        text = RuntimeError(f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})")
        for error in (inner, outer, text):
            with pytest.raises(RunError, match="^no space left to write"), writing(str(tmp_path / "out"), dict(RECORD)):
                raise error


def test_a_failure_at_the_very_end_keeps_checkpoints_and_the_earlier_run(tmp_path, monkeypatch):
    out = tmp_path / "out"
    write(out, mark="old")
    original = Path.rename

    def rename(self, target):
        if self.name == "out.partial":
            raise OSError(errno.EBUSY, "Device or resource busy")
        return original(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        with pytest.raises(OSError, match="busy"), writing(str(out), dict(RECORD), overwrite=True) as run:
            (run.checkpoints / "checkpoint-7").mkdir()
            (run.path / "mark").write_text("new")
    assert (run.checkpoints / "checkpoint-7").is_dir() and (out / "mark").read_text() == "old"
    write(out, overwrite=True, resume=True)
    assert (out / "mark").read_text() == "new" and content(tmp_path) == ["out"]


def test_an_overwritten_run_that_cannot_be_removed_is_named(tmp_path, monkeypatch, capsys):
    write(tmp_path / "out", mark="old")
    monkeypatch.setattr(shutil, "rmtree", lambda path, **_: None)
    write(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "mark").read_text() == "new"
    assert f"could not be removed; it is in {tmp_path / 'out.old'}" in capsys.readouterr().err


def test_a_folder_called_old_is_nobodys_but_the_users(tmp_path):
    write(tmp_path / "out")
    (tmp_path / "out.old").mkdir()
    (tmp_path / "out.old" / "mine").touch()
    write(tmp_path / "out", overwrite=True)
    assert content(tmp_path / "out.old") == ["mine"] and content(tmp_path) == ["out", "out.old"]


@pytest.mark.parametrize(
    "name", ["", "/", "file", "file/out", "pipe", "loop", "zero\0byte", "x" * 250, "full", "/proc/out"]
)
def test_folders_that_cannot_be_used_are_refused_before_anything_is_run(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("full").mkdir()
    Path("full/notes.txt").touch()
    os.mkfifo("pipe")
    Path("loop").symlink_to("loop")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError) as refused, writing(name, dict(RECORD)):
        raise AssertionError("it was run")
    assert "\n" not in str(refused.value) and sorted(tmp_path.rglob("*")) == before


def test_names_people_give(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name, place in (("slash/", "here/slash"), ("a/../b", "here/b"), ("~/run", "home/run"), (".", "here")):
        if name == ".":
            shutil.rmtree("slash")
            shutil.rmtree("b")
            Path("a").rmdir() if Path("a").exists() else None
        write(name)
        assert (tmp_path / place / "run.json").is_file()


def test_a_file_system_that_cannot_rename_folders_is_refused_at_once(tmp_path, monkeypatch):
    def rename(self, target):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(Path, "rename", rename)
    with (
        pytest.raises(UsageError, match="Operation not supported: cannot create"),
        writing(str(tmp_path / "out"), dict(RECORD)),
    ):
        raise AssertionError("it was run")
    assert content(tmp_path) == []


def test_overwriting_what_the_new_run_needs_is_refused(tmp_path):
    out, child = tmp_path / "out", tmp_path / "child"
    write(out)
    write(child, parent=str(out))
    for config in ({"model": str(out)}, {"models": ["x", str(child)]}, {"safety_data": f"{out}/data.jsonl:split=all"}):
        with pytest.raises(UsageError, match="--overwrite would remove .*, which --.* needs"):
            write(out, overwrite=True, config=config)
    assert (out / "mark").read_text() == "new"


def test_a_run_killed_before_its_first_checkpoint_starts_over(tmp_path):
    with pytest.raises(RunError), writing(str(tmp_path / "out"), dict(RECORD)) as run:
        (run.path / "log.jsonl").write_text('{"loss": 1}\n')
        raise RunError("the loss became nan")
    assert (run.path / "log.jsonl").exists()  # what a person wants to look at
    write(tmp_path / "out", config={"learning_rate": 1})
    assert content(tmp_path / "out") == ["README.md", "mark", "run.json"]


def test_text_that_utf8_cannot_hold_is_written_as_its_escape(tmp_path):
    with writing(str(tmp_path / "out"), {**RECORD, "command": "tunevax --model caf\udce9"}) as run:
        run.write_lines("rows.jsonl", [{"prompt": "\ud83d ü"}])
    assert json.loads((run.final / "rows.jsonl").read_text(encoding="utf-8")) == {"prompt": "\ud83d ü"}
