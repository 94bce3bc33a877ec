"""The processes of an audit and what they are given."""

import os
from types import SimpleNamespace

import pytest

from tunevax.audit import workers


@pytest.mark.parametrize(
    ("given", "count", "names"),
    [
        (None, 2, ["0", "1"]), ("4,5", 2, ["4", "5"]), (" 4 , 5 ", 2, ["4", "5"]), ("3", 1, ["3"]), ("", 0, []),
        ("GPU-8932f937,GPU-a1b2", 2, ["GPU-8932f937", "GPU-a1b2"]), ("0,-1,1", 1, ["0"]), ("-1", 0, []), ("7,,8", 1, ["7"]),
        ("MIG-41b3,MIG-52c4", 1, ["MIG-41b3", "MIG-52c4"]), ("NoDevFiles", 0, []), ("MIG-41b3", 0, []),
    ],
)  # fmt: skip
@pytest.mark.parametrize("variable", workers.VISIBLE)
def test_workers_share_the_devices_they_were_given(monkeypatch, variable, given, count, names):
    for name in workers.VISIBLE:
        monkeypatch.delenv(name, raising=False)
    if given is not None:
        monkeypatch.setenv(variable, given)
    assert workers.devices(count) == names
    monkeypatch.setattr(workers, "Worker", lambda *_: None)
    monkeypatch.setattr(workers.threading.Thread, "start", lambda self: None)
    monkeypatch.setattr(workers.signal, "signal", lambda *_: None)
    monkeypatch.setattr(workers.console, "quiet", False)
    counter = workers.multiprocessing.get_context("spawn").Value("i", 0)
    where = variable if given is not None else "CUDA_VISIBLE_DEVICES"
    seen = []
    for _ in range(3):  # each of a process of its own, which inherits what was given
        with monkeypatch.context() as worker:
            worker.setattr(workers.os, "environ", dict(os.environ))
            workers._start_worker(None, 0, counter, count, None)
            seen.append(workers.os.environ.get(where))
    assert seen == ([(names * 3)[i] for i in range(3)] if names else [given] * 3)


def test_threads_that_were_asked_for_are_not_raised(monkeypatch):
    class Stop(Exception):
        pass

    def executor(*_, **__):
        seen.append(os.environ["OMP_NUM_THREADS"])
        raise Stop

    seen = []
    monkeypatch.setattr(workers, "ProcessPoolExecutor", executor)
    monkeypatch.setattr(workers, "cores", lambda: 8)
    for given, expected in (("1", "1"), ("16", "4"), (None, "4")):
        if given is None:
            monkeypatch.delenv("OMP_NUM_THREADS")
        else:
            monkeypatch.setenv("OMP_NUM_THREADS", given)
        with pytest.raises(Stop), workers.pool(SimpleNamespace(options=None, exclusion=None), None, None, 2):
            pass
        assert seen.pop() == expected and os.environ.get("OMP_NUM_THREADS") == given
