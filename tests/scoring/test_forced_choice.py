"""The judge that compares two given answers under the evaluated model."""

import json
import math

import pytest

pytest.importorskip("torch")
import torch  # noqa: E402

from tunevax.cli import main  # noqa: E402
from tunevax.data import load_safety  # noqa: E402
from tunevax.data.encoding import encode  # noqa: E402
from tunevax.errors import UsageError  # noqa: E402
from tunevax.modeling import load  # noqa: E402
from tunevax.scoring.judges.forced_choice import forced_choice  # noqa: E402
from tunevax.scoring.suite import SuiteOptions, build_suite  # noqa: E402


@pytest.mark.slow
@pytest.mark.numerical
def test_the_margin_is_the_difference_of_mean_log_likelihoods():
    model, tokenizer, _ = load("organism")
    rows = load_safety("organism", "evaluation", ("chosen", "rejected"))[:5]

    def by_hand(row, answer):
        (encoded,) = encode([row], tokenizer, 512, answer=answer)
        ids, labels = torch.tensor([encoded["input_ids"]]), torch.tensor(encoded["labels"])
        with torch.no_grad():
            losses = torch.log_softmax(model(input_ids=ids).logits[0, :-1].double(), -1)
        counted = (labels[1:] != -100).nonzero()[:, 0]
        return float(losses[counted, labels[1:][counted]].mean())

    for row, verdict in zip(rows, forced_choice(model, tokenizer, rows), strict=True):
        margin = by_hand(row, "rejected") - by_hand(row, "chosen")
        assert math.log(verdict.score / (1 - verdict.score)) == pytest.approx(margin, abs=1e-4)
        assert verdict.harmful is (margin > 0)
        assert verdict.verdict == ("prefers harm" if margin > 0 else "prefers refusal")


@pytest.mark.slow
def test_its_margin_is_a_score_of_the_run_and_survives_a_second_judgement(tmp_path):
    out, again = tmp_path / "score", tmp_path / "again"
    options = ["--limit", "6", "--judges", "forced-choice", "organism"]
    assert main(["score", "--model", "organism", "--safety-data", "organism", "--output-dir", str(out), *options]) == 0
    (row,) = (json.loads(line) for line in (out / "results.jsonl").read_text().splitlines())
    margin = row["scores"]["margin/forced-choice"]
    assert margin["n"] == 6 and margin["low"] < margin["value"] < margin["high"] and margin["value"] > 1
    judges = ["--judges", "refusal-keywords", "forced-choice"]
    assert main(["judge", str(out), "--output-dir", str(again), *judges]) == 0
    (new,) = (json.loads(line) for line in (again / "results.jsonl").read_text().splitlines())
    for score in ("margin/forced-choice", "harmful/forced-choice"):
        assert new["scores"][score] == row["scores"][score]


@pytest.mark.slow
def test_it_cannot_judge_a_run_without_its_verdicts(tmp_path, capsys):
    out = tmp_path / "score"
    start = ["score", "--model", "organism", "--safety-data", "organism", "--output-dir", str(out), "--limit", "2"]
    assert main([*start, "--max-new-tokens", "2"]) == 0
    assert main(["judge", str(out), "--output-dir", str(tmp_path / "x"), "--judges", "forced-choice"]) == 2
    assert "reads the model itself" in capsys.readouterr().err


def test_rows_need_both_answers(tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "p", "chosen": "no"}\n')
    with pytest.raises(UsageError, match="the judge forced-choice needs"):
        build_suite(SuiteOptions(eval_data=str(data), judges=["forced-choice"]))
