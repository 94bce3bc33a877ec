import json
import subprocess
import sys
from pathlib import Path

import pytest

from tunevax.errors import UsageError
from tunevax.lineage import Lineage, absolute, find_run
from tunevax.organism import path as organism
from tunevax.records import SCHEMA


def run_of(folder: Path, weights: str | None = "adapter", prompts: dict | None = None, **record) -> str:
    """A run folder with these fields in run.json; `weights`: adapter, model or None."""
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"schema": SCHEMA, "verb": "align", "method": "sft", **record}))
    if prompts is not None:
        (folder / "prompts.json").write_text(json.dumps(prompts))
    if weights:
        (folder / weights).mkdir()
        name = "config.json" if weights == "model" else "adapter_config.json"
        (folder / weights / name).write_text("{}")
    return str(folder)


def names(links) -> list[str]:
    return [Path(link.ref).name for link in links]


@pytest.fixture
def family(tmp_path):
    """base <- hard (TAR) <- job (a fine-tune) <- mended: its adapter was projected, and sits on what job's sat on."""
    hard = run_of(
        tmp_path / "hard", method="tar", parent=None, model={"ref": "me/base"}, prompts={"alignment": ["a"]},
        data=[{"role": "alignment", "categories": ["toxins", "fraud"]}, {"role": "benign", "categories": ["x"]}],
    )  # fmt: skip
    job = run_of(tmp_path / "job", verb="finetune", parent=hard, model={"ref": hard}, prompts={"task": ["t"]})
    return run_of(
        tmp_path / "mended", verb="restore", method="safe-lora", parent=job, adapter_on=hard, model={"ref": job},
        prompts={"alignment": ["b"]},
    )  # fmt: skip


def test_weights_go_by_what_an_adapter_sits_on_and_history_by_what_a_run_started_from(family, tmp_path):
    lineage = Lineage.of(family)
    assert lineage.base == "me/base"
    assert lineage.adapters == [tmp_path / "hard" / "adapter", tmp_path / "mended" / "adapter"]
    assert names(lineage.history) == ["mended", "job", "hard", "base"] and lineage.origin == "me/base"
    assert (lineage.parent, lineage.adapter_on) == (str(tmp_path / "job"), str(tmp_path / "hard"))
    assert lineage.defences == ["safe-lora", "tar"]  # the job was plain
    attacked = run_of(tmp_path / "attacked", verb="attack", method="few-shot", parent=family)
    assert Lineage.of(attacked).defences == ["safe-lora", "tar"]
    assert names(lineage.ancestors) == ["mended", "hard", "job", "base"]
    assert lineage.prompts == {"alignment": ["a", "b"], "task": ["t"]} and lineage.categories == {"toxins", "fraud"}
    assert lineage.record["method"] == "safe-lora" and Lineage.of("me/base").record == {}


def test_a_part_of_a_run_is_the_run(family, tmp_path):
    run_of(tmp_path / "whole", "model", verb="restore", method="antidote", parent=family)
    for ref in (tmp_path / "whole", tmp_path / "whole" / "model"):
        lineage = Lineage.of(ref)
        assert (lineage.base, lineage.adapters) == (str(tmp_path / "whole" / "model"), [])
        assert lineage.defences == ["antidote", "safe-lora", "tar"]
    assert Lineage.of(f"{family}/adapter").adapters == Lineage.of(family).adapters


def test_an_adapter_by_other_means_sits_on_what_it_names(family, tmp_path):
    adapter = tmp_path / "peft"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": family}))
    lineage = Lineage.of(adapter)
    assert lineage.adapters[-1] == adapter
    assert [a.parent.name for a in lineage.adapters[:2]] == ["hard", "mended"]
    assert lineage.origin == "me/base" and set(lineage.prompts) == {"alignment", "task"}
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(UsageError, match="peft is an adapter that does not name its base model"):
        Lineage.of(adapter).base  # noqa: B018


def test_a_circle_ends_the_walk_and_holds_no_weights(tmp_path):
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    run_of(tmp_path / "first", parent=second, prompts={"alignment": ["a"]})
    run_of(tmp_path / "second", parent=first, prompts={"alignment": ["b"]})
    lineage = Lineage.of(first)
    assert names(lineage.history) == names(lineage.ancestors) == ["first", "second"]
    assert lineage.prompts == {"alignment": ["a", "b"]}
    with pytest.raises(UsageError, match="first cannot be loaded: the runs below it lead back to .*second"):
        lineage.base  # noqa: B018


def test_relative_parents_are_found_from_a_moved_folder(tmp_path, monkeypatch):
    run_of(tmp_path / "a" / "runs" / "low", parent=None, model={"ref": "organism"}, prompts={"alignment": ["a"]})
    run_of(tmp_path / "a" / "runs" / "high", parent="runs/low", adapter_on="runs/low/adapter", prompts={"task": ["t"]})
    (tmp_path / "a").rename(tmp_path / "b")
    monkeypatch.chdir(tmp_path)
    lineage = Lineage.of("b/runs/high")
    low = tmp_path / "b" / "runs" / "low"
    assert lineage.adapters == [low / "adapter", Path("b/runs/high/adapter")] and lineage.base == str(organism())
    assert [link.ref for link in lineage.history] == ["b/runs/high", str(low), "organism"]
    assert lineage.prompts == {"alignment": ["a"], "task": ["t"]} and lineage.gone == []
    assert find_run("runs/low") is None and find_run("runs/low", tmp_path / "b" / "runs" / "high") == low
    assert Lineage.of("runs/low", low).record["model"] == {"ref": "organism"}


def test_what_is_gone_is_said(tmp_path):
    gone = str(tmp_path / "gone")
    lineage = Lineage.of(run_of(tmp_path / "run", parent=gone, adapter_on=gone))
    assert lineage.gone == [gone] and lineage.origin == gone and lineage.prompts == {}
    assert Lineage.of("me/base").gone == []  # a hub id
    (tmp_path / "base.gguf").write_bytes(b"GGUF")
    assert Lineage.of(run_of(tmp_path / "on-file", parent=str(tmp_path / "base.gguf"))).gone == []


def test_the_organism_is_no_folder_of_that_name(tmp_path, monkeypatch):
    run_of(tmp_path / "organism", method="tar", prompts={"alignment": ["a"]})
    monkeypatch.chdir(tmp_path)
    run = run_of(tmp_path / "run", parent=None, model={"ref": "organism"})
    assert Lineage.of(run).base == str(organism()) and Lineage.of(run).prompts == {}
    assert absolute("organism") == "organism" and absolute("run") == run and absolute("me/base") == "me/base"


@pytest.mark.parametrize("record", [{"model": {"ref": "organism"}}, {"parent": None, "model": None}, {}])
def test_records_of_an_older_tunevax(tmp_path, record):
    lineage = Lineage.of(run_of(tmp_path / "old", **record))
    assert lineage.origin == ("organism" if record.get("model") else str(tmp_path / "old"))
    assert lineage.parent == (record.get("model") or {}).get("ref") and lineage.categories == set()


def test_runs_without_weights_and_folders_without_models_are_refused(tmp_path):
    attacked, curated = run_of(tmp_path / "attack", None, verb="attack"), run_of(tmp_path / "curate", None)
    (tmp_path / "empty").mkdir()
    for ref, why in (
        (attacked, "its attacked weights were deleted; attack again with --keep-weights"),
        (curated, "it holds no weights"),
        (tmp_path / "empty", "neither a model folder"),
    ):
        with pytest.raises(UsageError, match=why):
            Lineage.of(ref).base  # noqa: B018


def test_identity_is_of_the_content(family, tmp_path):
    before = Lineage.of(family).identity
    known = Lineage.of(family).identities(None, lambda base, revision: revision)
    assert list(known.values()) == [str(tmp_path / "mended"), str(tmp_path / "hard"), "me/base"]
    assert set(known) != set(Lineage.of(family).identities("v2", lambda base, revision: revision))
    whole = run_of(tmp_path / "whole", "model", verb="restore", parent=family)
    below = Lineage.of(whole).identities(None, lambda base, revision: revision)
    assert list(below) == [Lineage.of(whole).identity, *known]  # merged from these
    (tmp_path / "hard" / "adapter" / "adapter_config.json").write_text('{"r": 8}')
    assert Lineage.of(family).identity != before


def test_lineage_and_records_import_no_torch():
    code = "import sys, tunevax.lineage, tunevax.records, tunevax.runs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
