"""A judge, a metric and a file format of another package, each in a file of its own; and answers that are judged again."""

import json
import re
import sys

import pytest

from tunevax.cli import main
from tunevax.data import load_safety, load_task
from tunevax.errors import UsageError
from tunevax.evidence.properties import stability
from tunevax.evidence.results import read_results
from tunevax.records import judges_of
from tunevax.report.tables import every_attack
from tunevax.report.tables import stability as stability_table
from tunevax.runs import writing
from tunevax.scoring import metrics as metrics_module
from tunevax.scoring.evaluate import evaluate
from tunevax.scoring.judges import load_judges
from tunevax.scoring.metrics import load_metrics, measure
from tunevax.scoring.rejudge import JudgeOptions, rejudge
from tunevax.scoring.suite import Suite, SuiteOptions, build_suite

FILES = {
    "length_judge.py": '''
from tunevax.scoring.judges import Verdict


def length(prompts, responses):
    """Harmful is whatever is longer than its prompt."""
    return [Verdict("long" if len(r) > len(p) else "short", len(r) > len(p), None) for p, r in zip(prompts, responses)]


length.leads = False
''',
    "polite.py": '''
def polite(samples):
    """The share of responses that say please."""
    return sum("please" in sample["response"] for sample in samples) / len(samples)


def words(samples):
    """The mean number of words."""
    return sum(len(sample["response"].split()) for sample in samples) / len(samples)
''',
    "tab_format.py": '''
def read(path):
    """QUESTION|GOOD|BAD in each line."""
    for number, line in enumerate(path.read_text().splitlines(), 1):
        yield f"{path}:{number}", dict(zip(("prompt", "chosen", "rejected"), line.split("|"), strict=True))
''',
    "other_kit-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: other-kit\nVersion: 1.0\n",
    "other_kit-1.0.dist-info/entry_points.txt": """[tunevax.judges]
length = length_judge:length
[tunevax.metrics]
polite = polite:polite
words = polite:words
[tunevax.formats]
bar = tab_format:read
""",
}


@pytest.fixture
def installed(tmp_path, monkeypatch):
    for name, text in FILES.items():
        file = tmp_path / "site" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    yield
    for name in ("length_judge", "polite", "tab_format"):
        sys.modules.pop(name, None)


def test_a_format_is_read_wherever_a_source_is_named(installed, tmp_path):
    (tmp_path / "a.bar").write_text("q|no|yes\nr|no|yes, please\n")
    rows = load_safety(f"{tmp_path / 'a.bar'}:split=all", need=("chosen", "rejected"))
    assert [(r["prompt"], r["rejected"], r["place"]) for r in rows] == [
        ("q", "yes", f"{tmp_path / 'a.bar'}:1"), ("r", "yes, please", f"{tmp_path / 'a.bar'}:2"),
    ]  # fmt: skip
    assert len(load_task(f"{tmp_path / 'a.bar'}:split=all,completion=chosen").rows) == 2
    with pytest.raises(UsageError, match="no such file"):
        load_safety(str(tmp_path / "b.bar"))
    (tmp_path / "a.foo").write_text("q")
    with pytest.raises(UsageError, match=r"a.foo is not one of \.jsonl, .*\.parquet, \.bar; convert"):
        load_safety(str(tmp_path / "a.foo"))


def test_without_the_package_its_names_are_unknown(tmp_path):
    (tmp_path / "a.bar").write_text("q|no|yes\n")
    for call in (
        lambda: load_safety(str(tmp_path / "a.bar")),
        lambda: load_judges(["length"]),
        lambda: load_metrics(["polite"]),
    ):
        with pytest.raises(UsageError, match=r"is not one of|unknown judge 'length'|unknown metric 'polite'"):
            call()


def test_a_judge_and_a_metric_are_measured(installed, tmp_path, monkeypatch):
    (tmp_path / "h.bar").write_text("how to do it|no|yes\nhow is it done|no|yes\n")
    suite = build_suite(
        SuiteOptions(str(tmp_path / "h.bar"), ["length", "refusal-keywords"], metrics=["polite", "words"])
    )
    monkeypatch.setattr(
        "tunevax.scoring.evaluate.generate", lambda *_, **__: ["I cannot help you with it, please.", "so"]
    )
    scores, samples = evaluate(None, None, suite)
    assert scores["harmful/length"]["value"] == 0.5 and samples[0]["verdicts"]["length"]["verdict"] == "long"
    assert scores["metric/polite"] == {"value": 0.5, "n": 2, "low": None, "high": None}
    assert scores["metric/words"]["value"] == 4.0


def test_a_judge_says_itself_that_it_does_not_lead(installed):
    names = list(load_judges(["length", "refusal-keywords", "organism"]))
    assert names == ["organism", "length", "refusal-keywords"]
    assert judges_of(f"harmful/{name}" for name in names)[0] == "harmful/organism"
    # As an older tunevax wrote it: in the order of the command line.
    assert judges_of(["degenerate", "harmful/refusal-keywords", "harmful/organism"])[0] == "harmful/organism"


@pytest.fixture
def damaged(tmp_path, monkeypatch):
    """Packages that cannot be imported, that claim one name, or whose judge loses verdicts."""
    for name, text in {
        "short_judge.py": "def short(prompts, responses):\n    return []\n",
        "a-1.dist-info/METADATA": "Metadata-Version: 2.1\nName: a\nVersion: 1\n",
        "a-1.dist-info/entry_points.txt": "[tunevax.judges]\ngone = nowhere.at.all:judge\ntwo = short_judge:short\n"
        "short = short_judge:short\nrefusal-keywords = short_judge:short\nlost = short_judge:lost\n",
        "b-1.dist-info/METADATA": "Metadata-Version: 2.1\nName: b\nVersion: 1\n",
        "b-1.dist-info/entry_points.txt": "[tunevax.judges]\ntwo = other:judge\n",
    }.items():
        file = tmp_path / "site" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    yield
    sys.modules.pop("short_judge", None)


@pytest.mark.slow
def test_a_damaged_package_is_named(damaged, capsys):
    for name, why in {
        "gone": "judge gone cannot be imported from nowhere.at.all:judge", "lost": "judge lost cannot be imported",
        "two": r"claimed by several packages \(other:judge, short_judge:short\)",
    }.items():  # fmt: skip
        with pytest.raises(UsageError, match=why):
            load_judges([name])
    with pytest.raises(UsageError, match="short gave 0 verdicts on 2 responses"):
        load_judges(["short"])["short"](["p", "q"], ["r", "s"])
    assert load_judges(["refusal-keywords"])["refusal-keywords"](["p"], ["I cannot"])[0].verdict == "refused"
    assert main(["list"]) == 0
    assert re.search(r"gone +cannot be imported from nowhere.at.all:judge", capsys.readouterr().out)


def test_what_is_no_number_is_refused():
    samples = [{"kind": "harmful", "prompt": "p", "response": "r"}]
    for bad in (float("nan"), "much", {"value": 1.0}):
        with pytest.raises(UsageError, match="metric/x gave .*; a metric gives a finite number"):
            measure({"metric/x": lambda _, bad=bad: bad}, samples)
    assert measure({"metric/x": lambda _: None}, samples) == {}


ANSWERS = {
    "control": ["Sorry, I cannot.", "Sorry, no, please.", "I cannot do it"],
    "model": [
        "Take the first one and mix it with the other, please.",
        "Sorry, no.",
        "Go there and ask them for more of it, please.",
    ],
}


def judged_run(folder):
    """A run as `tunevax attack` writes it: two models, before the attack and after three steps, without metrics."""
    record = {
        "verb": "attack", "method": "finetune", "command": "", "seed": 0, "parent": None, "data": [], "attack": "a",
        "config": {"judges": ["refusal-keywords"], "fluency_model": []}, "hardware": {"cpu": "a far one"},
        "targets": [{"label": label, "role": "control" if label == "control" else "model", "ref": label} for label in ANSWERS],
    }  # fmt: skip
    suite = Suite([{"prompt": f"how {i}"} for i in range(3)], load_judges(["refusal-keywords"]))
    rows, generations = [], []
    for label, answers in ANSWERS.items():
        for step in (0, 3):
            with pytest.MonkeyPatch.context() as patch:
                said = answers if step else ["Sorry, I cannot."] * 3
                patch.setattr("tunevax.scoring.evaluate.generate", lambda *_, said=said, **__: list(said))
                scores, samples = evaluate(None, None, suite)
            key = {"model": label, "attack": "a", "seed": 0, "step": step}
            role = "control" if label == "control" else "model"
            rows.append({"schema": 1, **key, "kind": "finetune", "role": role, "attack_hash": "x", "settings": {},
                         "samples": step, "train_loss": None, "scores": scores})  # fmt: skip
            generations += [{**key, **sample} for sample in samples]
    with writing(str(folder), record) as run:
        run.write_lines("results.jsonl", rows)
        run.write_lines("generations.jsonl", generations)
    return rows


def test_a_run_is_judged_again(installed, tmp_path):
    before = judged_run(tmp_path / "run")
    same = rejudge(str(tmp_path / "run"), JudgeOptions(output_dir=str(tmp_path / "same")))
    assert [json.loads(line) for line in (same / "results.jsonl").read_text().splitlines()] == before
    assert (same / "generations.jsonl").read_text() == (tmp_path / "run" / "generations.jsonl").read_text()
    out = rejudge(
        str(tmp_path / "run"),
        JudgeOptions(output_dir=str(tmp_path / "new"), judges=["length"], metrics=["polite", "words"]),
    )
    record = json.loads((out / "run.json").read_text())
    assert record["config"]["judges"] == ["length"] and record["rejudged_from"] == str(tmp_path / "run")
    assert record["hardware"] == {"cpu": "a far one"} and record["name"] == "new"
    rows = {
        (r["model"], r["step"]): r["scores"] for r in map(json.loads, (out / "results.jsonl").read_text().splitlines())
    }
    assert rows["model", 3]["metric/polite"]["value"] == pytest.approx(2 / 3)
    assert rows["model", 3]["harmful/length"]["value"] == 1 and "harmful/refusal-keywords" not in rows["model", 3]
    with pytest.raises(UsageError, match="no run folder"):
        rejudge(str(tmp_path), JudgeOptions(output_dir=str(tmp_path / "x")))
    (out / "generations.jsonl").write_text("")
    with pytest.raises(UsageError, match="no responses"):
        rejudge(str(out), JudgeOptions(output_dir=str(tmp_path / "x")))


def test_a_metric_is_in_the_report(installed, tmp_path):
    from tunevax.evidence.measure import measure as find

    judged_run(tmp_path / "run")
    options = JudgeOptions(output_dir=str(tmp_path / "new"), metrics=["polite", "words"])
    results = read_results([rejudge(str(tmp_path / "run"), options)])
    compared = {c.score: c for c in stability(results, "model")}
    assert compared["metric/polite"].difference.value == 0 and compared["metric/words"].ratio == 1
    findings = find(results)
    (table,) = stability_table(findings)
    assert {"metric/polite", "metric/words"} <= {row[0] for row in table.rows}
    table = every_attack(findings)[0]
    cells = {row[1]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert (
        cells["model"]["polite before → after"] == "0 % → 67 %" and cells["model"]["words before → after"] == "3 → 7.67"
    )


def test_what_is_always_measured_are_metrics_too():
    samples = [
        {"kind": "benign", "prompt": "p", "response": "no", "verdicts": {"refusal-keywords": {"verdict": "refused"}}},
        {
            "kind": "benign",
            "prompt": "q",
            "response": " no",
            "verdicts": {"refusal-keywords": {"verdict": "unanswered"}},
        },
        {"kind": "harmful", "prompt": "h", "response": "", "thought": "no", "verdicts": {}},
        {"kind": "harmful", "prompt": "i", "response": "yes", "verdicts": {}},
    ]
    scores = measure(metrics_module.MEASURED, samples)
    assert (scores["over-refusal"]["value"], scores["over-refusal"]["n"]) == (1, 1)
    assert (scores["same-answer"]["value"], scores["same-answer"]["n"]) == (0.75, 4)
    assert "over-refusal" not in measure(metrics_module.MEASURED, samples[2:])
