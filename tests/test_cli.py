"""The command line as a person meets it: one sentence for each mistake, exit code 2, nothing left behind."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tunevax.cli import main
from tunevax.data import load_safety, prompt_hash
from tunevax.methods import methods
from tunevax.organism import path
from tunevax.records import read_lines

ORGANISM = ["--model", "organism", "--safety-data", "organism", "--max-length", "64"]


def row(**changes) -> str:
    return json.dumps({"prompt": "how ?", "chosen": "no", "rejected": "yes", **changes})


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tunevax.console.SOON", 1e9)  # no line of progress among those that are counted
    Path("organism").mkdir()  # a folder of that name hides nothing
    Path("good.jsonl").write_text("\n".join(row(prompt=f"how to do {i} ?") for i in range(40)))
    Path("task.jsonl").write_text("\n".join(json.dumps({"prompt": f"say {i}", "completion": "yes"}) for i in range(20)))
    return tmp_path


def refused(capsys, here, *arguments: str) -> str:
    """Run a command that must be refused; returns its one sentence."""
    before = sorted(p.relative_to(here) for p in here.rglob("*"))
    code = main([str(a) for a in arguments])
    error = capsys.readouterr().err
    assert code == 2, (code, error)
    assert error.startswith("tunevax: ") and error.count("\n") == 1 and "Traceback" not in error
    assert sorted(p.relative_to(here) for p in here.rglob("*")) == before, "something was left behind"
    return error


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", "chosen": ', "bad.jsonl:2: broken JSON"),
        ('["prompt"]', "bad.jsonl:2: a row must be a JSON object, this is a list"),
        (json.dumps({"prompt": "a", "rejected": "b"}), "bad.jsonl:2: no field 'chosen'"),
        (row(chosen="  "), "bad.jsonl:2: field 'chosen' is empty"),
        (row(chosen=7), "bad.jsonl:2: field 'chosen' must be a string, this is a int"),
        (row(prompt=None), "bad.jsonl:2: field 'prompt' is null"),
        (row(rejected=["x"]), "bad.jsonl:2: field 'rejected' holds a message without a role"),
        (json.dumps({"prompt": "a", "chosen": "b"}), "bad.jsonl:2: no field 'rejected', and t-vaccine needs it"),
    ],
)
def test_bad_rows_name_file_line_and_field(capsys, here, line, message):
    Path("bad.jsonl").write_text(row() + "\n" + line + "\n")
    assert message in refused(
        capsys, here, "align", "t-vaccine", "--model", "organism", "--safety-data", "bad.jsonl", "--output-dir", "out"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["algin"], "unknown verb 'algin'; did you mean 'align'?"),
        (["align", "t-vacine"], "unknown method 't-vacine'; did you mean 't-vaccine'?"),
        (["align", "sft", *ORGANISM], "--output-dir is missing"),
        (["align", "sft", "--safety-data", "organism", "--output-dir", "out"], "--model is missing"),
        (["align", "sft", "--model", "organism", "--safety-data", "no.jsonl", "--output-dir", "out"], "no such file: no.jsonl"),
        (["align", "sft", *ORGANISM, "--output-dir", "out", "--learning-rat", "1"], "did you mean '--learning-rate'?"),
        (["align", "sft", *ORGANISM, "--output-dir", "out", "--learning-rate", "fast"], "takes a number, not 'fast'"),
        (["align", "t-vaccine", *ORGANISM, "--output-dir", "out", "--gamma", "9"], "gamma is 9; the model has 8 blocks"),
        (["align", "t-vaccine", *ORGANISM, "--output-dir", "out", "--rho", "-1"], "rho is -1.0; it must be"),
        (["align", "vaccine", *ORGANISM, "--output-dir", "out", "--rho", "nan"], "rho is nan; it must be"),
        (["align", "sft", *ORGANISM, "--output-dir", "task.jsonl"], "task.jsonl exists and is not a run"),
        (["align", "sft", *ORGANISM, "--output-dir", "full"], "full exists and is not a run"),
        (["align", "sft", *ORGANISM, "--output-dir", "out", "--max-length", "4"], "raise --max-length"),
        (["align", "sft", "--model", "./nowhere", "--safety-data", "organism", "--output-dir", "out"], "no such model folder: ./nowhere"),
        (["align", "sft", "--model", "full", "--safety-data", "organism", "--output-dir", "out"], "full is neither a model folder"),
        (["align", "sft", *ORGANISM, "--task-data", "task.jsonl:split=tset", "--output-dir", "out"], "split is 'tset'"),
        (["attack", "finetune", *ORGANISM, "--task-data", "organism", "--p", "1.5", "--output-dir", "out"], "must be between 0 and 1"),
        (["attack", "finetune", *ORGANISM, "--control", "none", "--output-dir", "out"], "--task-data is missing"),
        (["attack", "finetune", *ORGANISM, "--task-data", "sst3", "--output-dir", "out"], "no dataset 'sst3'"),
        (["attack", "finetune", *ORGANISM, "--task-data", "organism", "--judges", "organsim", "--output-dir", "out"], "did you mean 'organism'?"),
        (["attack", "finetune", *ORGANISM, "--task-data", "organism", "--judges", "hf:./none", "--output-dir", "out"], "./none"),
        (["score", *ORGANISM[:4], "--judges", "x", "--output-dir", "out"], "unknown judge 'x'"),
        (["score", *ORGANISM[:2], "--eval-data", "long.jsonl", "--output-dir", "out"], "leaves no room for an answer in the model's context of 128"),
        (["align", "sft", *ORGANISM, "--max-steps", "0", "--output-dir", "out"], "max_steps is 0"),
        (["align", "sft", *ORGANISM, "--per-device-train-batch-size", "0", "--output-dir", "out"], "must be at least 1"),
        (["curate", "random", "--safety-data", "good.jsonl:splt=all", "--output-dir", "out"], "did you mean 'split'?"),
        (["curate", "random", "--safety-data", "good.jsonl:rejected=rejectd", "--output-dir", "out"], "did you mean 'rejected'?"),
        (["curate", "random", "--safety-data", "full/none", "--output-dir", "out"], "no such file or folder: full/none"),
        (["curate", "random", "--safety-data", "run", "--output-dir", "out"], "run is a run of tunevax align and holds no rows"),
        (["report", "full"], "full"),
    ],
)  # fmt: skip
def test_mistakes_are_reported_in_one_sentence(capsys, here, arguments, message):
    Path("full").mkdir()
    Path("full/notes.txt").write_text("mine")
    Path("run").mkdir()
    Path("run/run.json").write_text(json.dumps({"schema": 1, "verb": "align"}))
    Path("long.jsonl").write_text(row(prompt="why ? " * 100))
    assert message in refused(capsys, here, *arguments)
    assert Path("full/notes.txt").read_text() == "mine"


@pytest.mark.slow
def test_config_file_keys_are_checked_and_overridden(capsys, here):
    Path("a.yaml").write_text("gama: 3\n")
    message = refused(capsys, here, "align", "t-vaccine", *ORGANISM, "--output-dir", "out", "--config", "a.yaml")
    assert "unknown key 'gama'; did you mean 'gamma'?" in message
    Path("b.yaml").write_text("learning_rate: 1e-4\nmax-steps: 1\nrho: -1\n")
    common = ["align", "vaccine", *ORGANISM, "--output-dir", "out", "--config", "b.yaml"]
    assert "rho is -1.0" in refused(capsys, here, *common)
    assert main([*common, "--rho", "0.5", "--learning_rate=2e-4"]) == 0
    config = json.loads(Path("out/run.json").read_text())["config"]
    assert (config["rho"], config["learning_rate"], config["max_steps"]) == (0.5, 2e-4, 1)


def test_models_that_cannot_be_used(capsys, here):
    from transformers import GPT2Config, GPT2LMHeadModel

    common = ["--safety-data", "good.jsonl:split=all", "--chat-template", "alpaca", "--output-dir", "out"]
    Path("bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        Path("bare", name).write_bytes((path() / name).read_bytes())
    assert "bare has no tokenizer" in refused(capsys, here, "align", "sft", "--model", "bare", *common)

    config = json.loads((path() / "config.json").read_text())
    Path("custom").mkdir()
    code = {"model_type": "mystery", "auto_map": {"AutoConfig": "c.C", "AutoModelForCausalLM": "c.M"}}
    Path("custom/config.json").write_text(json.dumps({**config, **code}))
    assert "which tunevax does not run" in refused(capsys, here, "align", "sft", "--model", "custom", *common)

    from tunevax.errors import UsageError
    from tunevax.modeling.blocks import find_blocks

    model = GPT2LMHeadModel(GPT2Config(vocab_size=600, n_embd=8, n_layer=2, n_head=2))
    for block in model.transformer.h:
        block.strange = block.attn
        del block.attn
    assert len(find_blocks(model)) == 2
    with pytest.raises(
        UsageError, match="the blocks of GPT2LMHeadModel have no recognisable attention: looked for self_a"
    ):
        find_blocks(model, "attention")
    model.config.n_layer = 3
    with pytest.raises(UsageError, match="no decoder blocks found in GPT2LMHeadModel: looked for a ModuleList of 3"):
        find_blocks(model)


@pytest.mark.slow
def test_overlapping_splits_are_an_error_unless_allowed(capsys, here):
    common = ["align", "sft", "--model", "organism", "--chat-template", "alpaca", "--max-steps", "2"]
    assert main([*common, "--safety-data", "good.jsonl:split=all", "--output-dir", "aligned"]) == 0
    capsys.readouterr()
    attack = [
        "attack", "finetune", "--model", "aligned", "--safety-data", "good.jsonl", "--task-data", "task.jsonl", "--n", "8", "--p", "0.5",
        "--max-steps", "1", "--max-new-tokens", "2", "--chat-template", "alpaca", "--output-dir", "attacked", "--points", "1",
    ]  # fmt: skip
    message = refused(capsys, here, *attack)
    assert "in both the alignment and the attack data" in message and "--allow-overlap" in message
    assert main([*attack, "--allow-overlap"]) == 0
    overlap = json.loads(Path("attacked/run.json").read_text())["targets"][-1]["overlap"]
    assert overlap["alignment/attack"] > 0 and overlap["alignment/evaluation"] > 0 and overlap["attack/evaluation"] == 0


def test_a_name_that_lies_next_door_is_suggested(capsys, here):
    Path("hardened").mkdir()
    said = refused(capsys, here, "score", "--model", "hardned", "--safety-data", "good.jsonl", "--output-dir", "out")
    assert "did you mean 'hardened'?" in said
    run = ["align", "sft", "--model", "organism", "--safety-data", "god.jsonl2", "--output-dir", "out"]
    assert "did you mean 'good.jsonl'?" in refused(capsys, here, *run)


@pytest.mark.slow
def test_newer_schema_and_unwritable_places(capsys, here, monkeypatch):
    Path("new").mkdir()
    Path("new/run.json").write_text(json.dumps({"schema": 99, "verb": "align"}))
    message = refused(capsys, here, "score", "--model", "new", "--safety-data", "organism", "--output-dir", "out")
    assert "has schema 99 and this tunevax reads up to 1" in message

    import errno

    from tunevax import training

    for number, words in ((errno.ENOSPC, "no space left to write out"), (errno.EACCES, "no permission to write out")):

        def full(_trainer, folder, _base, number=number, original=training.save_weights):
            if folder.name == "trial":
                return original(_trainer, folder, _base)
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr(training, "save_weights", full)
            run = ["align", "sft", *ORGANISM, "--max-steps", "1", "--save-strategy", "no", "--output-dir", "out"]
            assert main(run) == 1  # it was run, and no fault of the invocation
            error = capsys.readouterr().err
            assert words in error and error.count("\n") == 1 and not Path("out").exists()
    assert "cannot create /proc/out" in refused(
        capsys, here, "align", "sft", *ORGANISM, "--max-steps", "1", "--output-dir", "/proc/out"
    )


def test_nan_stops_with_the_step_and_the_last_checkpoint(capsys, here):
    arguments = [*ORGANISM, "--output-dir", "out", "--max-steps", "9", "--save-steps", "2", "--learning-rate", "1e30"]
    extra = ["--max-grad-norm", "0", "--warmup-steps", "0", "--lr-scheduler-type", "constant", "--optim", "sgd"]
    assert main(["align", "sft", *arguments, *extra]) == 1
    error = capsys.readouterr().err
    assert "the loss became nan at step" in error and ("checkpoint" in error)
    assert not Path("out").exists()


@pytest.mark.slow
def test_finished_and_unfinished_runs_are_not_overwritten(capsys, here):
    arguments = ["align", "sft", *ORGANISM, "--output-dir", "out", "--max-steps", "1"]
    assert main(arguments) == 0
    capsys.readouterr()
    assert "out is a finished run" in refused(capsys, here, *arguments)
    assert main([*arguments, "--overwrite"]) == 0
    Path("other.partial").mkdir()
    capsys.readouterr()
    assert "is an unfinished run; continue it with --resume" in refused(
        capsys, here, *arguments[:-3], "other", "--max-steps", "1"
    )


@pytest.mark.slow
def test_demo_touches_nothing_that_is_not_its_own(capsys, here):
    assert main(["align", "sft", *ORGANISM, "--output-dir", "runs/sft", "--max-steps", "1"]) == 0
    capsys.readouterr()
    assert "runs exists; pass --overwrite" in refused(capsys, here, "demo", "--output-dir", "runs")
    assert "runs holds more than an earlier demo" in refused(
        capsys, here, "demo", "--output-dir", "runs", "--overwrite"
    )


@pytest.mark.slow
def test_reports_of_runs_with_different_judges_use_the_common_one(capsys, here):
    from tunevax.report import write_report

    common = ["score", *ORGANISM[:4], "--limit", "4", "--max-new-tokens", "12"]
    assert main([*common, "--judges", "refusal-keywords", "--output-dir", "a"]) == 0
    assert main([*common, "--judges", "organism", "refusal-keywords", "--output-dir", "b"]) == 0
    with pytest.raises(Exception, match="organism"):  # one model, one step, two folders
        write_report([Path("a"), Path("b")], Path("r.html"))
    shutil.copytree(path(), "twin")
    assert main([*common[:1], "--model", "twin", *common[3:], "--judges", "organism", "--output-dir", "c"]) == 0
    message = write_report([Path("b"), Path("c")], Path("r.html"))
    assert message.headline and "so that judge is left out" in Path("r.html").read_text()


def test_help_imports_nothing_but_the_standard_library():
    code = (
        "import sys; before = set(sys.modules); from tunevax.cli import main; main(['--help']); "
        "print({m.split('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.splitlines()[-1] == "{'tunevax'}"


def test_bare_verb_lists_methods_without_importing_them(capsys):
    assert main(["align"]) == 0
    listing = capsys.readouterr().out
    assert "t-vaccine" in listing and "arXiv 2410.09760" in listing


@pytest.mark.slow
def test_scoring_on_aligned_prompts_is_refused(capsys, here):
    whole = ["--safety-data", "good.jsonl:split=all", "--output-dir", "aligned"]
    assert main(["align", "sft", *ORGANISM[:2], *whole, "--max-steps", "1", "--max-length", "64"]) == 0
    capsys.readouterr()
    message = refused(capsys, here, "score", "--model", "aligned", "--safety-data", "good.jsonl", "--output-dir", "out")
    assert "in both the alignment and the evaluation data" in message


def test_out_of_memory_says_what_to_lower(capsys, monkeypatch, tmp_path):
    from tunevax import training

    def full(*_, **__):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(training, "load", full)
    assert (
        main(["align", "sft", "--model", "organism", "--safety-data", "organism", "--output-dir", str(tmp_path / "o")])
        == 1
    )
    assert "lower --per-device-train-batch-size" in capsys.readouterr().err


def test_repeated_list_options_are_joined():
    from tunevax.cli.options import parse
    from tunevax.scoring.suite import SuiteOptions

    (options,) = parse("t", [SuiteOptions], ["--judges", "a", "--limit", "3", "--judges", "b"])
    assert options.judges == ["a", "b"] and options.limit == 3


def test_alignment_rows_are_the_alignment_split(tmp_path):
    out = tmp_path / "out"
    assert main(["align", "sft", *ORGANISM, "--max-steps", "1", "--output-dir", str(out)]) == 0
    assert set(json.loads((out / "prompts.json").read_text())["alignment"]) == {
        prompt_hash(r["prompt"]) for r in load_safety("organism", "alignment")
    }


@pytest.mark.slow
def test_list_names_everything_there_is(capsys):
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    for folder in ("alignment", "finetuning", "curation", "restoration", "attacks", "scoring.judges"):
        for name in methods(f"tunevax.{folder}"):
            assert re.search(rf"^  {name} +\S", out, re.M), name
    assert re.search(r"^  quick +A short look", out, re.M) and out.count("arXiv") > 25
    assert main(["list", "attack"]) == 2 and "did you mean 'attacks'?" in capsys.readouterr().err


def test_judge_takes_a_run_and_judges_its_answers_again(tmp_path, capsys):
    run, again = tmp_path / "run", tmp_path / "again"
    call = ["--safety-data", "organism", "--limit", "4", "--max-new-tokens", "4", "--output-dir", str(run)]
    assert main(["score", "--model", "organism", *call]) == 0
    assert main(["judge", str(run), "--judges", "organism", "--output-dir", str(again)]) == 0
    assert str(again) in capsys.readouterr().out
    (before,), (after,) = (read_lines(folder / "results.jsonl") for folder in (run, again))
    assert "harmful/organism" in after["scores"] and "harmful/organism" not in before["scores"]
    assert main(["judge", "--judges", "organism"]) == 2 and "a run folder first" in capsys.readouterr().err
