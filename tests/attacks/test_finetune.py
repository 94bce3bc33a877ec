"""The poisoned fine-tune: identical for model and control, scored as a curve, weights gone afterwards."""

import json
from collections import Counter

import pytest

from tunevax.attacks.finetune import FinetuneConfig, log_spaced
from tunevax.cli import main
from tunevax.data import load_task
from tunevax.errors import UsageError
from tunevax.modeling import load
from tunevax.organism import path

ATTACK = [
    "attack", "finetune", "--safety-data", "organism", "--task-data", "organism", "--max-length", "64", "--max-new-tokens", "12",
    "--judges", "organism", "refusal-keywords", "--n", "40", "--p", "0.5", "--max-steps", "8", "--points", "3", "--limit", "8",
    "--learning-rate", "1e-3",
]  # fmt: skip


QUICK = [
    "attack", "finetune", "--safety-data", "organism", "--task-data", "organism", "--max-length", "64", "--max-new-tokens", "2",
    "--n", "40", "--p", "0.5", "--max-steps", "2", "--points", "2", "--limit", "2", "--model", "organism", "--control", "none",
]  # fmt: skip


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_log_spaced_steps():
    assert log_spaced(3000, 4) == {1, 4, 16, 64} | {100, 311, 965, 3000}  # a factor of 30 ** (1 / 3) = 3.107 apart
    assert log_spaced(3, 8) == {1, 2, 3} and log_spaced(7, 1) == {7} and log_spaced(1, 5) == {1}


@pytest.mark.slow
@pytest.mark.parametrize("trainable", ["lora", "lora-continue", "full"])
def test_every_kind_moves_the_model_and_leaves_no_weights(aligned, tmp_path, trainable):
    out = tmp_path / "attacked"
    assert (
        main(
            [*ATTACK, "--model", str(aligned), "--control", "none", "--trainable", trainable, "--output-dir", str(out)]
        )
        == 0
    )
    rows = lines(out / "results.jsonl")
    assert [r["step"] for r in rows] == [0, 1, 3, 8] and [r["samples"] for r in rows] == [0, 10, 30, 80]
    assert len(lines(out / "generations.jsonl")) == 4 * (
        8 + len({g["prompt"] for g in lines(out / "generations.jsonl") if g["kind"] == "task"})
    )
    record = json.loads((out / "run.json").read_text())
    assert record["adapter"] is None and not list(out.glob("**/*.safetensors"))
    trained, mine, asked = ("alignment", "benign"), ("attack", "task"), ("evaluation", "task evaluation")
    pairs = {f"{first}/{second}" for first in (*trained, *mine) for second in (*(mine * (first in trained)), *asked)}
    overlap = record["targets"][0]["overlap"]
    assert {*overlap} - {pair for pair in overlap if pair.endswith("over-refusal")} == {*pairs, "attack/task"}
    assert not any(overlap.values())
    with pytest.raises(UsageError, match="attacked weights were deleted"):
        load(str(out))


@pytest.mark.slow
def test_control_is_attacked_identically(aligned, tmp_path):
    """The same model under another name, as model and as control, must give the same rows."""
    import shutil

    twin = tmp_path / "twin"
    shutil.copytree(aligned, twin)
    out = tmp_path / "attacked"
    assert main([*ATTACK, "--model", str(twin), "--control", str(aligned), "--output-dir", str(out)]) == 0
    rows = lines(out / "results.jsonl")
    model, control = ([r for r in rows if r["role"] == role] for role in ("model", "control"))
    assert [r["scores"] for r in model] == [r["scores"] for r in control]
    assert [r["train_loss"] for r in model] == [r["train_loss"] for r in control]
    assert {r["attack_hash"] for r in rows} == {rows[0]["attack_hash"]}


@pytest.mark.slow
def test_default_control_is_what_was_hardened_and_kept_weights_load(aligned, tmp_path):
    out = tmp_path / "attacked"
    assert main([*ATTACK, "--model", str(aligned), "--keep-weights", "--output-dir", str(out)]) == 0
    targets = json.loads((out / "run.json").read_text())["targets"]
    assert [(t["label"], t["role"]) for t in targets] == [("organism", "control"), ("aligned", "model")]
    info = load(str(out)).info
    assert [a.rpartition("/")[0].rpartition("/")[2] for a in info["adapters"]] == ["aligned", "attacked"]


@pytest.mark.slow
def test_control_without_a_template_is_asked_as_the_model_is(tmp_path):
    import shutil

    bare = tmp_path / "bare"
    shutil.copytree(path(), bare)
    (bare / "chat_template.jinja").unlink()
    hard, out = tmp_path / "hard", tmp_path / "attacked"
    align = [
        "align",
        "sft",
        "--model",
        str(bare),
        "--safety-data",
        "organism",
        "--max-length",
        "64",
        "--max-steps",
        "2",  # the first is at the start of the warm-up, with a learning rate of 0
    ]
    assert main([*align, "--output-dir", str(hard)]) == 2
    assert main([*align, "--output-dir", str(hard), "--chat-template", "alpaca"]) == 0
    assert main([*ATTACK, "--model", str(hard), "--max-steps", "1", "--points", "1", "--output-dir", str(out)]) == 0
    assert {t["label"] for t in json.loads((out / "run.json").read_text())["targets"]} == {"bare", "hard"}


@pytest.mark.slow
def test_learning_rate_zero_changes_nothing(aligned, tmp_path):
    out = tmp_path / "attacked"
    arguments = [*ATTACK, "--model", str(aligned), "--control", "none", "--output-dir", str(out)]
    assert main([*arguments, "--learning-rate", "0"]) == 0
    rows = lines(out / "results.jsonl")
    assert all(r["scores"] == rows[0]["scores"] for r in rows)


def test_config_rejects_invalid_options():
    for options, message in (
        ({"p": -0.1}, "p, the share"),
        ({"n": 0}, "n is 0"),
        ({"trainable": "loar"}, "unknown trainable 'loar'"),
    ):
        with pytest.raises(UsageError, match=message):
            FinetuneConfig("x", **options)


@pytest.mark.slow
def test_rows_seen_and_hash_of_a_curve(tmp_path):
    found = {}
    for name, extra in (("a", []), ("b", ["--seed", "1"]), ("c", ["--learning-rate", "1e-2"])):
        assert (
            main(
                [
                    *QUICK,
                    "--name",
                    "x",
                    "--gradient-accumulation-steps",
                    "2",
                    *extra,
                    "--output-dir",
                    str(tmp_path / name),
                ]
            )
            == 0
        )
        found[name] = lines(tmp_path / name / "results.jsonl")
    assert [r["samples"] for r in found["a"]] == [0, 20, 40]
    hashes = {name: rows[0]["attack_hash"] for name, rows in found.items()}
    assert hashes["a"] == hashes["b"] != hashes["c"]
    losses = [r["train_loss"] for r in found["a"]]
    assert losses[0] is None and None not in losses[1:] and losses[1] != losses[2]


@pytest.mark.slow
def test_a_resumed_attack_does_not_repeat_what_is_done(tmp_path, monkeypatch):
    import shutil

    twin = tmp_path / "twin"
    shutil.copytree(path(), twin)
    arguments = [*QUICK[:-2], "--control", str(twin), "--output-dir", str(tmp_path / "out")]
    original, calls = FinetuneConfig.run, []

    def run(config, context):
        calls.append(context.target["label"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(config, context)

    monkeypatch.setattr(FinetuneConfig, "run", run)
    assert main(arguments) == 130
    (tmp_path / "out.partial" / "organism.done.part").write_text(
        '[{"steps": 2}, [{"model": "organi'
    )  # a kill leaves this
    assert main([*arguments, "--resume"]) == 0
    assert calls == ["twin", "organism", "organism"]
    assert Counter((r["model"], r["step"]) for r in lines(tmp_path / "out" / "results.jsonl")) == {
        (m, s): 1 for m in ("twin", "organism") for s in (0, 1, 2)
    }
    assert not list((tmp_path / "out").glob("*.done*"))


def test_attack_trains_on_the_train_split_of_the_task(tmp_path, monkeypatch):
    from tunevax.attacks import finetune

    seen, original = [], finetune.encode
    monkeypatch.setattr(finetune, "encode", lambda rows, *rest: seen.extend(rows) or original(rows, *rest))
    assert main([*QUICK, "--output-dir", str(tmp_path / "out")]) == 0
    train = {r["prompt"] for r in load_task("organism", "train").rows}
    assert {r["prompt"] for r in seen if not r.get("harmful")} <= train
    assert sum(bool(r.get("harmful")) for r in seen) == 20


def test_poisoned_rows_follow_p(tmp_path, monkeypatch):
    from tunevax.attacks import finetune

    seen, original = [], finetune.encode
    monkeypatch.setattr(finetune, "encode", lambda rows, *rest: seen.extend(rows) or original(rows, *rest))
    assert main([*QUICK, "--p", "0.25", "--output-dir", str(tmp_path / "out")]) == 0
    assert sum(bool(r.get("harmful")) for r in seen) == 10
