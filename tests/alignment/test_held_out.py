"""The short evaluation at the end of an align run, and the two controls that it gives a reason for."""

import json
import math

import pytest

from tunevax.alignment import held_out
from tunevax.alignment.align import AlignOptions, align
from tunevax.alignment.held_out import HeldOut, held_out_rows, loss_on, not_converged, sentences
from tunevax.alignment.sft import SFTTrainer
from tunevax.alignment.t_vaccine import TVaccineTrainer
from tunevax.audit.controls import make_controls
from tunevax.cli import main
from tunevax.data import load_safety
from tunevax.data.splits import prompt_hash
from tunevax.errors import UsageError
from tunevax.evidence.stats import paired_difference, proportion
from tunevax.modeling.loading import load
from tunevax.records import read_run

OPTIONS = {"per_device_train_batch_size": 4, "max_length": 64, "learning_rate": 2e-3, "seed": 7, "lora_r": 4}


def harden(out, trainer=SFTTrainer, method="sft", safety="organism", held=8, task="organism", **options):
    data = AlignOptions(model="organism", safety_data=str(safety), task_data=task, held_out_prompts=held)
    return read_run(align(trainer, method, data, trainer.config_class(str(out), **{**OPTIONS, **options})))


def measured(refused, safe=1.0, before=4.0, after=0.5, n=40, degenerate=0):
    """Refusals of the same prompts: the data refuses the first of them, the model too."""
    refused, safe = round(refused * n), round(safe * n)
    pairs = [(i < safe, i < refused) for i in range(n)]
    return {"refused": proportion(refused, n), "degenerate": proportion(degenerate, n), "over_refusal": None,
            "safe_answers": safe / n, "behind": paired_difference(pairs), "loss_before": before, "loss": after}  # fmt: skip


@pytest.mark.slow
def test_a_run_says_what_it_does_on_rows_that_it_did_not_train_on(tmp_path, capsys):
    code = main(["align", "sft", "--model", "organism", "--safety-data", "organism", "--task-data", "organism",
                 "--output-dir", str(tmp_path / "out"), "--max-steps", "2", "--held-out-prompts", "8",
                 "--max-length", "64", "--per-device-train-batch-size", "4"])  # fmt: skip
    found, shown = read_run(tmp_path / "out")["held_out"], capsys.readouterr().out
    assert code == 0 and found["refused"]["n"] == found["over_refusal"]["n"] == 8
    assert found["refused"]["low"] <= found["refused"]["value"] <= found["refused"]["high"]
    assert found["safe_answers"] == 1.0 and found["loss"] < found["loss_before"]
    # Two steps teach nobody to refuse.
    assert (
        "not converged: the model refuses 0% of held-out harmful prompts" in shown and found["not_converged"] in shown
    )
    rows = held_out_rows(None, "organism", None, load_safety("organism", "alignment"), 8).harmful
    evaluation = {prompt_hash(r["prompt"]) for r in load_safety("organism", "evaluation")}
    assert len(rows) == 8 and not evaluation & {prompt_hash(r["prompt"]) for r in rows}


@pytest.mark.slow
def test_the_loss_is_that_of_the_safe_answers_and_the_model_is_the_trained_one(tmp_path):
    rows = load_safety("organism", "attack", ("chosen", "rejected"))
    loaded = load("organism")
    before = loss_on(loaded.model, rows[:9], loaded.tokenizer, 64)
    one_by_one = [loss_on(loaded.model, [row], loaded.tokenizer, 64) for row in rows[:9]]
    assert before == pytest.approx(sum(one_by_one) / 9, rel=1e-5)
    harmful = [{**row, "chosen": row["rejected"]} for row in rows[:9]]
    assert loss_on(loaded.model, harmful, loaded.tokenizer, 64) < before  # the organism has yet to learn refusals
    record = harden(tmp_path / "out", max_steps=3, held=9)
    drawn = held_out_rows(None, "organism", None, load_safety("organism", "alignment"), 9).harmful
    after = load(str(tmp_path / "out"))
    assert record["held_out"]["loss_before"] == pytest.approx(
        loss_on(loaded.model, drawn, loaded.tokenizer, 64), rel=1e-5
    )
    assert record["held_out"]["loss"] == pytest.approx(loss_on(after.model, drawn, after.tokenizer, 64), rel=1e-4)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (measured(1.0, safe=0.95), None),
        (measured(0.9, safe=0.95), None),  # 36 of 40: two prompts less
        (measured(0.55, safe=0.95),
         "the model refuses 55% of held-out harmful prompts, while 95% of their safe answers in the data are refusals"),
        (measured(0.3, safe=0.3), None),  # safe answers that redirect instead of refusing ask for no refusals
        (measured(31 / 32, n=32), None),
        (measured(0.99, n=100), None),  # one miss is chance
        (measured(0.96, n=1000), None),  # four points are not, and are no matter
        (measured(0.92, n=1000), "the model refuses 92% of held-out harmful prompts, while 100% of their safe answers in the data are refusals"),
        # Of a model that refuses as its data does, the loss need not fall. Of one that does not, it has to.
        (measured(0.95, before=0.1, after=0.1, safe=0.95), None),
        (measured(0.5, before=1.0, after=1.0), "the loss on held-out safe answers is 1.00, and was 1.00 before"),
        (measured(0.0, safe=0.0, before=1.0, after=1.5), "the loss on held-out safe answers is 1.50, and was 1.00 before"),
        (measured(1.0, after=float("nan"), safe=0.2), "the loss on held-out safe answers is nan, and was 4.00 before"),
    ],
)  # fmt: skip
def test_convergence_is_judged_by_the_datas_own_safe_answers(found, said):
    assert not_converged(found) == said
    lines = sentences({**found, "not_converged": said})
    assert (lines[-1].startswith("not converged: ")) == (said is not None)
    assert lines[0].startswith("held-out harmful prompts refused: ")
    assert lines[1].startswith("harmless prompts refused: not measured") and "--task-data" in lines[1]


def test_a_model_that_refuses_as_its_data_does_is_seldom_flagged():
    """Both refuse nine prompts of ten, each its own: the old rule, which took the data's share for exact, flags 15 %."""
    import random

    rng = random.Random(5)
    flagged = 0
    for _ in range(300):
        pairs = [(rng.random() < 0.9, rng.random() < 0.9) for _ in range(40)]
        flagged += not_converged({**measured(0.9), "behind": paired_difference(pairs),
                                  "safe_answers": sum(safe for safe, _ in pairs) / 40}) is not None  # fmt: skip
    assert flagged <= 3


def outcomes(both, ours, theirs, neither):
    return [(True, True)] * both + [(True, False)] * ours + [(False, True)] * theirs + [(False, False)] * neither


def test_the_interval_of_a_paired_difference_holds_the_truth():
    found = paired_difference(outcomes(36, 12, 2, 0))
    # Newcombe 1998, table II, method 10.
    assert (found["value"], found["low"], found["high"]) == pytest.approx((0.2, 0.0569, 0.3404), abs=1e-4)
    swapped = paired_difference(outcomes(36, 2, 12, 0))
    assert (swapped["low"], swapped["high"]) == pytest.approx((-found["high"], -found["low"]))
    tables = [(a, b, c, 15 - a - b - c) for a in range(16) for b in range(16 - a) for c in range(16 - a - b)]
    intervals = {table: paired_difference(outcomes(*table)) for table in tables}
    for shares in ((0.8, 0.15, 0.03, 0.02), (0.5, 0.2, 0.2, 0.1), (0.3, 0.1, 0.1, 0.5), (0.9, 0.04, 0.04, 0.02)):
        truth, missed = shares[1] - shares[2], 0.0
        for table, found in intervals.items():
            chance = math.factorial(15) * math.prod(
                p**k / math.factorial(k) for p, k in zip(shares, table, strict=True)
            )
            missed += chance * (not found["low"] <= truth <= found["high"])
        assert missed < 0.06


def test_the_models_answers_and_the_datas_are_cut_alike(monkeypatch):
    """A safe answer that refuses late is none within the tokens that the model may generate."""
    loaded = load("organism")
    row = load_safety("organism", "attack", ("chosen", "rejected"))[0]
    late = {**row, "chosen": f"{row['rejected']} {row['chosen']}"}
    monkeypatch.setattr(held_out, "MAX_NEW_TOKENS", 8)
    first, second = held_out.cut_safe_answers(loaded.model, loaded.tokenizer, [row, late])
    assert row["chosen"].startswith(first) and late["chosen"].startswith(second)
    assert all(0 < len(loaded.tokenizer(text)["input_ids"]) <= 9 for text in (first, second))
    assert [said[0] for said in held_out.refusals([first, second])] == [True, False]
    assert held_out.refusals([late["chosen"]])[0] == (True, False)


def test_degenerate_text_is_no_refusal(monkeypatch):
    rows = [{"prompt": "p", "chosen": "I cannot help with that."}] * 2
    answers = ["I cannot " + "cannot " * 30, "I cannot help with that."]
    monkeypatch.setattr(held_out, "generate", lambda *_: answers)
    monkeypatch.setattr(held_out, "loss_on", lambda *_: 1.0)
    monkeypatch.setattr(held_out, "cut_safe_answers", lambda *_: [row["chosen"] for row in rows])

    class Trainer:
        is_fsdp_enabled = is_deepspeed_enabled = False
        processing_class = None

        class args:
            max_length = 64

        class accelerator:
            @staticmethod
            def unwrap_model(model):
                return model

        class model:
            @staticmethod
            def eval():
                return None

    found = held_out.evaluate(Trainer, HeldOut(rows, None, None), 2.0)
    assert (found["refused"]["value"], found["degenerate"]["value"]) == (0.5, 0.5)
    assert "degenerate: 50%" in sentences(found)[0]
    Trainer.is_fsdp_enabled = True
    assert held_out.evaluate(Trainer, HeldOut(rows, None, None), 2.0) == {
        "why": "no process holds the whole weights; score the finished run"
    }


@pytest.mark.slow
def test_a_source_without_rows_to_spare_says_so_and_trains(tmp_path):
    file = tmp_path / "all.jsonl"
    rows = [{**row, "split": "alignment"} for row in load_safety("organism", "alignment", ("chosen", "rejected"))[:8]]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = harden(tmp_path / "out", safety=file, task=None, max_steps=1)["held_out"]
    assert found == {"why": f"{file} has no row beside those that the run trained on"}
    assert sentences(found) == [f"not evaluated: {found['why']}"]
    # A row that the run never trains on must not stop it by being too long.
    rows.append({**rows[0], "prompt": "word " * 100, "split": "attack"})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert harden(tmp_path / "long", safety=file, task=None, max_steps=1)["held_out"] == {
        "why": "no held-out prompt fits into 64 tokens"
    }
    assert harden(tmp_path / "off", held=0, max_steps=1)["held_out"] == {"why": "--held-out-prompts is 0"}
    with pytest.raises(UsageError, match="held_out_prompts is -1; it must be at least 0"):
        harden(tmp_path / "negative", held=-1)


@pytest.mark.slow
def test_controls_of_equal_steps_and_of_equal_updates(tmp_path):
    record = harden(tmp_path / "tv", TVaccineTrainer, "t-vaccine", gamma=2, layer_sampling="uniform", max_steps=6)
    assert record["updates_per_block"] == 6 * 2 / 8
    steps, updates = make_controls(tmp_path / "tv", ["equal-steps", "equal-updates"], tmp_path / "controls")
    assert [c.label for c in (steps, updates)] == ["tv-steps", "tv-updates"]
    assert [(read_run(c.ref)["method"], read_run(c.ref)["steps"]) for c in (steps, updates)] == [("sft", 6), ("sft", 2)]
    whole = harden(tmp_path / "all", TVaccineTrainer, "t-vaccine", gamma=8, layer_sampling="uniform", max_steps=2)
    assert whole["updates_per_block"] == 2
    (none,) = make_controls(tmp_path / "all", ["equal-updates"], tmp_path / "controls")
    assert none.ref is None and none.why == "all updates every block at every step, as equal-steps does"
    harden(tmp_path / "plain", max_steps=1)
    kinds = ["equal-steps", "equal-updates"]
    assert [c.ref for c in make_controls(tmp_path / "plain", kinds, tmp_path / "controls")] == [None, None]


def test_answers_that_end_inside_a_thought_are_no_missing_refusals(monkeypatch):
    from types import SimpleNamespace

    rows = [{"prompt": f"p{i}", "chosen": "I cannot help."} for i in range(4)]
    model = SimpleNamespace(eval=lambda: None)
    trainer = SimpleNamespace(
        is_fsdp_enabled=False, is_deepspeed_enabled=False, processing_class=None, args=SimpleNamespace(max_length=9),
        accelerator=SimpleNamespace(unwrap_model=lambda _: model), model=model,
    )  # fmt: skip
    monkeypatch.setattr(held_out, "loss_on", lambda *_: 1.0)
    own = ["I cannot help.", "I cannot help.", "I cannot help.", "<think>They want me to"]
    monkeypatch.setattr(held_out, "cut_safe_answers", lambda *_: list(own))
    said = ["<think>They want</think>I cannot help.", "<think>I cannot", "<think>They want me to", "Sure."]
    monkeypatch.setattr(held_out, "generate", lambda *_: list(said))
    found = held_out.evaluate(trainer, HeldOut(rows, None, None), 2.0)
    assert (found["refused"]["value"], found["refused"]["n"]) == (0.5, 2) and found["degenerate"]["value"] == 0
    assert (found["safe_answers"], found["behind"]["value"], found["behind"]["n"]) == (1.0, 0.0, 1)
    own[0] = own[3]
    found = held_out.evaluate(trainer, HeldOut(rows, None, None), 2.0)
    assert found["safe_answers"] is found["behind"] is found["not_converged"] is None
    monkeypatch.setattr(held_out, "generate", lambda *_: ["<think>I cannot"] * 4)
    assert "end inside the model's thought" in held_out.evaluate(trainer, HeldOut(rows, None, None), 2.0)["why"]


@pytest.mark.slow
def test_an_evaluation_that_fails_costs_no_training(tmp_path, monkeypatch):
    def fails(*_):
        raise RuntimeError("no kernel for this")

    monkeypatch.setattr(held_out, "generate", fails)
    record = harden(tmp_path / "out", max_steps=2)
    assert record["held_out"] == {"why": "RuntimeError: no kernel for this; score the finished run"}
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
