"""The run folder: whole or absent, and never in the way of an earlier one."""

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


def test_a_failed_overwrite_keeps_the_old_run(tmp_path):
    record = {"verb": "x", "method": None, "config": {}}
    with writing(str(tmp_path / "out"), dict(record)):
        pass
    with pytest.raises(RuntimeError), writing(str(tmp_path / "out"), dict(record), overwrite=True):
        raise RuntimeError
    assert (tmp_path / "out" / "run.json").is_file()
