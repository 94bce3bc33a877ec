"""The sections of the stages, from small real runs on the organism."""

import html
import json
import re
import sys
from importlib.metadata import EntryPoint
from types import ModuleType

import pytest

from tunevax import methods as library
from tunevax.cli import main
from tunevax.organism.world import World
from tunevax.records import read_lines
from tunevax.report import collect, write_report

EVIL = "<script>alert(1)</script> **b** | [x](http://e.vil) $\\frac$ \u202eabc \x07"


def tunevax(*arguments) -> None:
    assert main([str(a) for a in arguments]) == 0


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One run of each stage, a chain from chosen rows to a repaired model."""
    folder = tmp_path_factory.mktemp("runs")
    out = {name: folder / name for name in (
        "chosen", "aligned", "job", "lock", "locked", "safelora", "pruned", "sink", "hostile"
    )}  # fmt: skip
    rows = [{"prompt": f"{EVIL} {i}", "chosen": EVIL, "category": f"{EVIL}{i % 3}"} for i in range(20)]
    rows += [{"prompt": f"{EVIL} {i}.", "chosen": "again", "category": f"{EVIL}{i % 3}"} for i in range(4)]
    (folder / "rows.jsonl").write_text("".join(json.dumps({**row, "split": "alignment"}) + "\n" for row in rows))
    task = World().task("train")[:30]
    harmful = [{"prompt": r["prompt"], "completion": r["rejected"]} for r in World().safety("attack")[:4]]
    (folder / "job.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*task, *harmful]))
    safety, short = ("--safety-data", "organism"), ("--max-steps", 2, "--max-length", 64)
    tunevax("curate", "random", "--safety-data", folder / "rows.jsonl", "--output-dir", out["hostile"])
    tunevax("curate", "random", *safety, "--keep", 0.25, "--duplicates", "near", "--output-dir", out["chosen"])
    data = ("--safety-data", out["chosen"])
    tunevax("align", "sft", "--model", "organism", *data, *short, "--output-dir", out["aligned"])
    model = ("--model", out["aligned"])
    job = (*model, "--task-data", folder / "job.jsonl", *safety, "--screen", "report", *short, "--learning-rate", 1e-2)
    tunevax("finetune", "sft", *job, "--output-dir", out["job"])
    tunevax("restore", "extract-lock", *model, *safety, "--n", 20, "--heads", 3, "--output-dir", out["lock"])
    model = ("--model", out["job"])
    tunevax("restore", "safetylock", *model, "--lock", out["lock"], "--strength", 2, "--output-dir", out["locked"])
    tunevax("restore", "safe-lora", *model, "--number", 4, "--output-dir", out["safelora"])
    tunevax("restore", "antidote", *model, *safety, "--n", 8, "--output-dir", out["pruned"])
    pairs = ("--pairs", 8, "--output-dir", out["sink"])
    tunevax("analyze", "sink", "--model", out["aligned"], out["job"], *safety, *pairs)
    return out


def page_of(runs, folder, form="html") -> str:
    write_report(runs, folder / f"report.{form}", form)
    return (folder / f"report.{form}").read_text("utf-8")


def text_of(page: str) -> str:
    seen = re.sub(r"<style>.*?</style>|<svg.*?</svg>", " ", page, flags=re.S)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", seen)).replace("\u00a0", " "))


@pytest.mark.slow
def test_every_stage_has_its_section_from_its_own_run_alone(runs, tmp_path):
    for name, section, text in (
        ("chosen", "Which rows were kept", r"chosen \(random\) kept 160 of 640 rows \(25 %\)"),
        ("job", "Data screening", r"rows of the job are flagged"),
        ("lock", "Safety locks", r"lock chose 3 of aligned's 32 heads"),
        (
            "locked",
            "Safety locks",
            r"locked applied a lock of 3 heads .* to job at strength 2, .* ms to apply, .* KiB added",
        ),
        ("safelora", "Safe LoRA", r"safelora projected 4 of 56 layers of job"),
        ("pruned", "Antidote", r"pruned pruned, in 56 layers of job"),
        ("sink", "Where attention sinks", r"aligned has \d+ of 32 heads with positive divergence and job has"),
    ):
        page, plain = page_of([runs[name]], tmp_path), page_of([runs[name]], tmp_path, "md")
        assert f"<h2>{section}</h2>" in page and f"## {section}" in plain
        assert re.search(text, text_of(page)), name
        assert "nothing here says how safe a model is" in text_of(page)
        assert f"{name}: " in text_of(page).partition("nothing here says how safe a model is")[2]
        assert json.loads(page_of([runs[name]], tmp_path, "json"))["provenance"]["runs"][0]["name"] == name


@pytest.mark.slow
def test_numbers_are_those_of_the_run_folder(runs, tmp_path):
    screen = [json.loads(line) for line in (runs["job"] / "screen.jsonl").open()]
    found = json.loads(page_of([runs["job"]], tmp_path, "json"))["stages"][str(runs["job"])]["screen"]
    assert found == screen and len(screen) == 34
    page = text_of(page_of([runs["job"]], tmp_path))
    worst = max(screen, key=lambda r: (len(r["flagged"]), *(r[k] for k in ("gradient", "refusal"))))
    assert f"{sum(bool(r['flagged']) for r in screen):,} of 34 rows of the job" in page
    assert worst["place"].rsplit("/", 1)[-1] in page
    sink = json.loads((runs["sink"] / "sink.json").read_text())["models"]
    drawn = page_of([runs["sink"]], tmp_path)
    for model in sink:  # a dot for each positive head
        svg = re.search(rf"<figcaption>{model['label']} \(\w+\).*?</svg>", drawn, re.S)[0]
        dots = sum(group.count("<use") for group in re.findall(r"<g clip-path=[^>]*>(.*?)</g>", svg, re.S))
        assert dots == model["positive_heads"] == sum(d > 0 for layer in model["d"] for d in layer) > 0
    record = json.loads((runs["safelora"] / "run.json").read_text())["layers"]
    table = text_of(page_of([runs["safelora"]], tmp_path))
    assert table.count("•") == 1 + sum(row["projected"] for row in record)


@pytest.mark.slow
def test_runs_behind_are_found(runs, tmp_path):
    (tmp_path / "there").mkdir()
    _, _, provenance = collect([runs["locked"]])
    assert {run.name for run in provenance.behind} == {"locked", "job", "aligned", "chosen", "lock"}
    page = text_of(page_of([runs["locked"]], tmp_path / "there"))
    assert "Trained on them: aligned." in page and "Data screening" in page


@pytest.mark.slow
def test_hostile_rows_stay_text(runs, tmp_path):
    page, plain = page_of([runs["hostile"]], tmp_path), page_of([runs["hostile"]], tmp_path, "md")
    assert "<script" not in page and "\u202e" not in page and "\x07" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "$\\frac$" in page
    assert "<" not in re.sub(r"\\.", "", plain) and "](" not in re.sub(r"\\.", "", plain)
    assert "duplicate rows.jsonl:" in text_of(page) and "hostile: repeated prompts" in text_of(page)


@pytest.mark.slow
def test_corrupted_rows_are_counted_and_no_selector_sees_which_they_are(tmp_path):
    pool = [{"prompt": f"how {i} {i} ?", "chosen": "no ."} for i in range(40)]
    marked = [{**row, "corruption": ["stub", None, "noise", None][i % 4]} for i, row in enumerate(pool)]
    found = {}
    for name, rows in (("plain", pool), ("marked", marked)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = f"{tmp_path / name}.jsonl:split=all"
        tunevax("curate", "random", "--safety-data", data, "--keep", 0.3, "--output-dir", tmp_path / name)
        found[name] = read_lines(tmp_path / name / "scores.jsonl")
    assert [row["score"] for row in found["plain"]] == [row["score"] for row in found["marked"]]
    assert "corruption" not in (tmp_path / "marked" / "data.jsonl").read_text()
    assert "plain: rows corrupted" not in page_of([tmp_path / "plain"], tmp_path)
    sound = [row for row in found["marked"] if row["corruption"] is None]
    stubs = [row for row in found["marked"] if row["corruption"] == "stub"]
    above = sum(a["score"] > b["score"] for a in sound for b in stubs) / (len(sound) * len(stubs))
    kept = sum(row["kept"] for row in stubs)
    text = text_of(page_of([tmp_path / "marked"], tmp_path))
    assert f"stub 10 {kept * 10} % {100 * above:.0f} %" in text
    assert "any of these 20 " in text


@pytest.mark.slow
def test_a_run_without_its_files_and_numbers_that_are_none(runs, tmp_path):
    (tmp_path / "run").mkdir()
    info = json.loads((runs["job"] / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps(info))
    assert "rows of the job are flagged" in page_of([tmp_path / "run"], tmp_path)
    (tmp_path / "run" / "screen.jsonl").write_text('{"place": null, "gradient": NaN, "refusal": 0.1, "flagged": []}\n')
    for form in ("html", "md", "json"):
        assert "NaN" not in page_of([tmp_path / "run"], tmp_path, form)


@pytest.mark.slow
def test_same_folders_same_bytes(runs, tmp_path):
    for form in ("html", "md", "json"):
        assert page_of(runs.values(), tmp_path, form) == page_of(runs.values(), tmp_path, form)
    ids = re.findall(r'\bid="([^"]+)"', page_of(runs.values(), tmp_path))
    assert len(ids) == len(set(ids))


def test_a_package_shows_the_runs_of_its_own_verb(tmp_path, monkeypatch):
    module = ModuleType("shown_elsewhere")
    module.summary = lambda run: f"{run.name}: distilled."
    module.sections = lambda provenance, figures: []
    monkeypatch.setitem(sys.modules, "shown_elsewhere", module)
    entry = EntryPoint("distill", "shown_elsewhere", "tunevax.runs")
    monkeypatch.setattr(library, "entry_points", lambda group: [entry] if group == entry.group else [])
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"schema": 1, "verb": "distill", "name": "student"}))
    assert "student: distilled." in text_of(page_of([run], tmp_path))
