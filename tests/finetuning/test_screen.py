"""Detection at the door: planted rows are found, no row is lost, and what is done is what was asked."""

import json

import numpy as np
import pytest
import torch

from tunevax.data.encoding import collate, encode
from tunevax.data.mixing import mix
from tunevax.data.safety import load_safety
from tunevax.data.tasks import load_task
from tunevax.errors import UsageError
from tunevax.finetuning import screen as screening
from tunevax.finetuning.finetune import FinetuneOptions, finetune
from tunevax.finetuning.screen import Screening, cosine, probing, screen
from tunevax.finetuning.sft import FinetuneTrainer, JobConfig
from tunevax.modeling.loading import load
from tunevax.records import read_lines, read_run

SAFETY = load_safety("organism", "alignment", ("chosen", "rejected"))
HARMFUL = [{**r, "completion": r["rejected"]} for r in load_safety("organism", "attack", ("rejected",))]
BENIGN = load_task("organism:set=benign").rows + load_task("organism").rows[:12]


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A customer's file of 60 harmless rows and 6 harmful ones, and the line numbers of these."""
    rows = mix(BENIGN, HARMFUL, 0.1, 66, 0)
    file = tmp_path_factory.mktemp("job") / "job.jsonl"
    file.write_text("".join(json.dumps({k: r[k] for k in ("prompt", "completion")}) + "\n" for r in rows))
    return file, {number for number, row in enumerate(rows, 1) if "rejected" in row}


@pytest.fixture(autouse=True)
def fewer_pairs(monkeypatch):
    monkeypatch.setattr(screening, "PAIRS", 80)


def run(model, job, folder, action):
    data = FinetuneOptions(model=model, task_data=str(job), safety_data="organism", screen=action)
    config = JobConfig(str(folder), max_steps=2, warmup_steps=0, max_length=64, save_strategy="no")
    return finetune(FinetuneTrainer, "sft", data, config)


@pytest.mark.slow
def test_planted_rows_are_found_and_no_row_is_lost(aligned, job, tmp_path):
    file, planted = job
    seen = {}
    for action in ("report", "drop"):
        out = run(aligned, file, tmp_path / action, action)
        lines, told = read_lines(out / "screen.jsonl"), read_run(out)["screen"]
        assert [line["place"] for line in lines] == [f"{file}:{i}" for i in range(1, 67)]
        flagged = {i for i, line in enumerate(lines, 1) if line["flagged"]}
        assert flagged == planted
        assert all(sum(k in line["flagged"] for line in lines) >= 5 for k in told["thresholds"])
        dropped = {i for i, line in enumerate(lines, 1) if line["done"] == "dropped"}
        assert dropped == (flagged if action == "drop" else set())
        assert (told["flagged"], told["dropped"], told["rows"]) == (len(flagged), len(dropped), 66)
        for i, line in enumerate(lines, 1):
            over = [k for k, v in told["thresholds"].items() if line[k] >= round(v, 6)]
            assert line["flagged"] == over, i
        assert read_run(out)["data"][0]["role"] == "alignment" and read_run(out)["data"][1]["rows"] == 66
        seen[action] = set(json.loads((out / "prompts.json").read_text())["task"])
    assert len(seen["report"]) - len(seen["drop"]) == len(dropped)
    with pytest.raises(
        UsageError, match=rf"rows of {file} look like an attack: {file}:{min(flagged)}, .* and \d more;"
    ):
        run(aligned, file, tmp_path / "fail", "fail")
    assert not (tmp_path / "fail").exists() and not (tmp_path / "fail.partial").exists()


@pytest.mark.slow
def test_the_trainer_gets_what_the_screen_left(aligned, job, tmp_path, monkeypatch):
    """`report` trains on every row, as without a screen and with the same weights; `drop` on the others."""
    got = {"trained": []}
    original = FinetuneTrainer.__init__

    def init(self, model, args, *, task_data, **rest):
        got["rows"], got["grads"] = [r["place"] for r in task_data], [p.grad for p in model.parameters()]
        got["trained"].append([p.requires_grad for p in model.parameters()])
        original(self, model, args, task_data=task_data, **rest)

    monkeypatch.setattr(FinetuneTrainer, "__init__", init)
    weights = {}
    for action in ("off", "report", "drop"):
        out = run(aligned, job[0], tmp_path / action, action)
        weights[action] = (out / "adapter" / "adapter_model.safetensors").read_bytes()
        left = 66 - read_run(out).get("screen", {"dropped": 0})["dropped"]
        assert len(got["rows"]) == left and not any(g is not None for g in got["grads"])
    assert got["trained"][0] == got["trained"][1] == got["trained"][2]
    assert left < 66 and weights["off"] == weights["report"] != weights["drop"]


@pytest.mark.slow
def test_scores_are_those_of_the_definition(aligned):
    """Both scores of a few rows from stock hidden states and autograd on the last block's matrices."""
    loaded = load(aligned)
    model, tokenizer = loaded.model, loaded.tokenizer
    rows = [*HARMFUL[:2], *BENIGN[:2]]
    found = screen(model, tokenizer, rows, SAFETY, 64, seed=5)
    order = np.random.RandomState(5).permutation(len(SAFETY))[:80]
    matrices = [p for n, p in model.named_parameters() if ".layers.7." in n and p.dim() == 2]
    for matrix in matrices:  # a merged adapter leaves weights frozen
        matrix.requires_grad_(True)

    def look(row, completion):
        (encoded,) = encode([{**row, "completion": completion}], tokenizer, 64)
        out = model(**collate([encoded], tokenizer.pad_token_id), output_hidden_states=True)
        start = encoded["labels"].index(next(i for i in encoded["labels"] if i != -100))
        flat = torch.cat([g.flatten() for g in torch.autograd.grad(out.loss, matrices)])
        return flat, out.hidden_states[5][0, start - 1].detach()  # after block 5 of 8

    harm = [look(SAFETY[i], SAFETY[i]["rejected"]) for i in order[:40]]
    safe = [look(SAFETY[i], SAFETY[i]["chosen"]) for i in order[:40]]
    direction = torch.stack([g for g, _ in harm]).mean(0) - torch.stack([g for g, _ in safe]).mean(0)
    centre = torch.stack([h for _, h in harm]).mean(0)
    ours = [look(row, row["completion"]) for row in rows]
    for i, (g, h) in enumerate(ours):
        expected = torch.cosine_similarity(g, direction, dim=0).item()
        assert found.scores["gradient"][i] == pytest.approx(expected, abs=1e-4)
        rest = torch.stack([other for j, (_, other) in enumerate(ours) if j != i]).mean(0)
        expected = ((h - rest) @ (centre - rest) / ((centre - rest) @ (centre - rest))).item()
        assert found.scores["refusal"][i] == pytest.approx(expected, abs=1e-4)
    held_out = [look(SAFETY[i], SAFETY[i]["rejected"])[0] for i in order[40:]]
    known = sorted(torch.cosine_similarity(g, direction, dim=0).item() for g in held_out)
    assert found.thresholds["gradient"] == pytest.approx(known[1], abs=1e-4)  # 5 % of 40 are below known[2]
    assert found.thresholds["gradient"] > screening.FLOOR
    refused = [look(SAFETY[i], SAFETY[i]["chosen"])[0] for i in order[40:]]
    above = [torch.cosine_similarity(g, direction, dim=0).item() >= found.thresholds["gradient"] for g in refused]
    assert found.calibration == {
        "rows": 40,
        "harmful_at_threshold": {"gradient": 39 / 40, "refusal": 39 / 40},  # as chosen: it says nothing of other rows
        "refusals_flagged_by_gradient": sum(above) / 40,
    }


@pytest.mark.slow
def test_an_unaligned_model_is_no_ground_for_the_gradient_score(job):
    """And it says so, instead of flagging everything."""
    loaded = load("organism")
    found = screen(loaded.model, loaded.tokenizer, BENIGN[-12:] + HARMFUL[:2], SAFETY, 64, 0)
    assert not any("gradient" in flag for flag in found.flags())
    assert found.calibration["harmful_at_threshold"]["gradient"] < 0.5


@pytest.mark.slow
def test_safety_rows_are_cut_at_the_models_context(monkeypatch):
    """As the customer's are: a model of learned positions has none beyond."""
    loaded = load("organism")
    loaded.model.config.max_position_embeddings = 40
    lengths, original = [], screening.response_loss

    def response_loss(model, batch):
        lengths.append(batch["input_ids"].numel())
        return original(model, batch)

    monkeypatch.setattr(screening, "response_loss", response_loss)
    long = [{**row, "chosen": " ".join([row["chosen"]] * 20)} for row in SAFETY[:40]]
    screen(loaded.model, loaded.tokenizer, BENIGN[:2], long, 400, 0)
    assert len(lengths) == 82 and max(lengths) == 40


def test_the_model_comes_back_as_it_was():
    model = load("organism").model
    model.lm_head.weight.requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    with pytest.raises(KeyError), probing(model, 0) as probe:
        probe({"input_ids": [1, 2, 3]})
    assert [p.requires_grad for p in model.parameters()] == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert cosine([torch.zeros(2)], [torch.ones(2)]) == 0.0


def test_bad_input_is_named(job, tmp_path):
    loaded = load("organism")
    for safety, told in (
        ([], "the screen needs safety rows with chosen and rejected, and there are none"),
        ([{**SAFETY[0], "rejected": None}] * 50, "`rejected` is missing"),
        (SAFETY[:39], "at least 40 safety rows and there are 39"),
    ):
        with pytest.raises(UsageError, match=told):
            screen(loaded.model, loaded.tokenizer, BENIGN, safety, 64, 0)
    options = FinetuneOptions(model="organism", task_data=str(job[0]), screen="report")
    with pytest.raises(UsageError, match="--safety-data is missing: sft with --screen report needs"):
        finetune(FinetuneTrainer, "sft", options, JobConfig(str(tmp_path / "x")))
    everything = Screening({k: np.ones(3) for k in ("gradient", "refusal")}, {"gradient": 1, "refusal": 1}, {})
    with pytest.raises(UsageError, match="all 3 rows of F look like an attack"):
        screening.act(everything, BENIGN[:3], "drop", "F", None)
