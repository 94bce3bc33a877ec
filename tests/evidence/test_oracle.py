"""The committed evidence of experiments/, measured again, gives the numbers of the committed findings and report.

Their words are those of an earlier version, so of every text only the numbers are compared.
`python tests/evidence/test_oracle.py` writes both again, for a correction of the statistics or of the words: the diff
is what the correction changed, and the README of the experiment says why.
"""

import gzip
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from tunevax.evidence.findings import Difference, Paired
from tunevax.report import write_report

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
STUDIES = sorted(file.parent.name for file in EXPERIMENTS.glob("*/findings.json"))

# Fields of the findings that are younger than the committed ones. The tables of report.md show most of them.
YOUNGER = {
    *("agreement", "judged_otherwise", "judges", "limits", "metrics", "order", "outputs_kept", "repeats", "stopped"),
    *("task", "as_judged", "before", "by_judge", "degenerate_at_end", "ends", "margins", "worst_by"),
}
# Sections of report.md that quote outputs or the runs' command lines, neither of which is committed, or that depend on
# the attacks there are today ("Limitations" names those that were not tried).
LEFT_OUT = {"Do the judges agree?", "Sample outputs", "Limitations", "Commands"}
# Names that an earlier version wrote: the verdicts of findings.json and the sections of report.md.
VERDICTS = {"slow learner": "learns slower"}
TITLES = {
    "Read some outputs": "Sample outputs", "What this page cannot tell": "Limitations", "Do it again": "Commands",
    "What cannot be concluded from": "Inconclusive attacks and missing cells",
}  # fmt: skip
WORDS = {"headline", "sentence", "caveats", "sentences"}  # fields of the findings


def run_folder(results: bytes, folder: Path) -> Path:
    """A run folder as a finished audit leaves it, with these rows."""
    folder.mkdir()
    record = {"schema": 1, "verb": "audit", "status": "finished", "failed": [], "skipped": [], "stopped": []}
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "results.jsonl").write_bytes(results)
    return folder


def study_folder(study: str, tmp_path: Path) -> Path:
    return run_folder(gzip.decompress((EXPERIMENTS / study / "results.jsonl.gz").read_bytes()), tmp_path / study)


def committed(study: str) -> dict:
    return json.loads((EXPERIMENTS / study / "findings.json").read_text(encoding="utf-8"))


def report(study: str, tmp_path: Path, form: str) -> str:
    """The report on the committed rows. `paired` compares outputs, which are not committed, so it is taken from the
    committed findings; the sentences that follow from it are made again."""
    found = {(m["label"], a["attack"]): a["paired"] for m in committed(study)["models"] for a in m["attacks"]}

    def fill_in(results, model, judge) -> None:
        for attack in model.attacks:
            if p := found[model.label, attack.attack]:
                attack.paired = Paired(**{**p, "difference": Difference(**p["difference"])})

    output = tmp_path / f"report.{form}"
    with mock.patch("tunevax.evidence.properties.paired", fill_in):
        write_report([study_folder(study, tmp_path)], output, form)
    return output.read_text(encoding="utf-8")


def numbers(text: str) -> list[str]:
    return re.findall(r"[\d.,]*\d|∞|never within|at least|at most", text)


def compared(key: str, value):
    """A field of the findings without its words: of texts the numbers, of a verdict its name of today."""
    if key in WORDS:
        return numbers(value) if isinstance(value, str) else [numbers(text) for text in value]
    return VERDICTS.get(value, value) if key == "name" else value


def differences(new, old, place: str = "") -> list[str]:
    """Where two JSON values differ. Floats may differ in the last digits, which vary between processors."""
    if isinstance(new, dict) and isinstance(old, dict):
        keys = [key for key in {**old, **new} if not (key in YOUNGER and key not in old)]
        absent = [f"{place}.{key}: only in the {'new' if key in new else 'committed'}" for key in keys
                  if (key in new) != (key in old)]  # fmt: skip
        both = [key for key in keys if key in new and key in old]
        pairs = [(key, compared(key, new[key]), compared(key, old[key])) for key in both]
        return absent + [d for key, *pair in pairs for d in differences(*pair, f"{place}.{key}")]
    if isinstance(new, list) and isinstance(old, list) and len(new) == len(old):
        return [d for i, pair in enumerate(zip(new, old, strict=True)) for d in differences(*pair, f"{place}[{i}]")]
    if isinstance(new, float) and isinstance(old, float):
        same = math.isclose(new, old, rel_tol=1e-9, abs_tol=1e-12)
    else:
        same = type(new) is type(old) and new == old
    return [] if same else [f"{place}: {str(new)[:200]}, committed {str(old)[:200]}"]


def sections(page: str) -> dict[str, str]:
    """The sections of a Markdown report by their title of today; what is before the first has the title ''."""
    title, *rest = re.split(r"^## (.*)\n", page, flags=re.MULTILINE)
    return {"": title} | {TITLES.get(t, t): text for t, text in zip(rest[::2], rest[1::2], strict=True)}


def test_there_is_evidence():
    assert {"finetuning", "organism"} <= set(STUDIES)
    assert all((EXPERIMENTS / study / "results.jsonl.gz").is_file() for study in STUDIES)


@pytest.mark.parametrize("study", STUDIES)
def test_the_numbers_of_the_findings_are_the_committed_ones(study, tmp_path):
    new = json.loads(report(study, tmp_path, "json"))
    del new["provenance"]
    old = committed(study)
    if "stages" not in old:
        assert not any(new.pop("stages").values())
    assert differences(new, old) == []
    assert any(a["paired"] for m in old["models"] for a in m["attacks"])  # else the caveats on it are not compared


@pytest.mark.parametrize("study", STUDIES)
def test_the_numbers_of_the_report_are_the_committed_ones(study, tmp_path):
    new, old = (sections(text) for text in (
        report(study, tmp_path, "md"), (EXPERIMENTS / study / "report.md").read_text(encoding="utf-8"),
    ))  # fmt: skip
    assert [t for t in new if t not in LEFT_OUT] == [t for t in old if t not in LEFT_OUT]
    for title in new.keys() - LEFT_OUT:
        assert numbers(new[title]) == numbers(old[title]), title
    assert sum(text.count("\n| ") for title, text in new.items() if title not in LEFT_OUT) > 50  # rows of tables


@pytest.mark.parametrize("file", ["organism/mild", "organism/strong", "real/llama", "real/qwen3"])
def test_rows_of_the_first_version_are_read(file, tmp_path):
    folder = run_folder((EXPERIMENTS / f"{file}.jsonl").read_bytes(), tmp_path / "audit")
    write_report([folder], tmp_path / "report.json", "json")
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["repeats"] == [1] and found["control"] in ("sft", "base")
    for model in found["models"]:
        if model["role"] == "model":  # one seed, so their READMEs conclude nothing from them
            assert model["name"] not in ("longer", "learns slower", "sooner"), model["label"]
    if file.startswith("real/"):  # as its README says
        control = next(m for m in found["models"] if m["role"] == "control")
        assert all(step is None for a in control["attacks"] for step in a["steps"].values())


@pytest.mark.slow
def test_reading_evidence_imports_neither_torch_nor_transformers(tmp_path):
    folder = study_folder("finetuning", tmp_path)
    code = (
        "import sys; from pathlib import Path; from tunevax.report import write_report; "
        f"[write_report([Path({str(folder)!r})], Path({str(tmp_path)!r}) / f'page.{{form}}', form) for form in "
        "('json', 'md', 'html')]; "
        "print(*sorted({'torch', 'transformers', 'peft', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
    assert (tmp_path / "page.html").stat().st_size > 10_000


def write_again(study: str, tmp_path: Path) -> None:
    def kept(new, old):
        """The new value, without the fields that are younger than the committed one."""
        if isinstance(new, dict) and isinstance(old, dict):
            keys = [key for key in [*old, *(new.keys() - old.keys() - YOUNGER)] if key in new]
            return {key: kept(new[key], old.get(key)) for key in keys}
        if isinstance(new, list) and isinstance(old, list):
            return [kept(value, old[min(i, len(old) - 1)] if old else None) for i, value in enumerate(new)]
        return old if isinstance(new, float) and not differences(new, old) else new

    old, file = committed(study), EXPERIMENTS / study / "findings.json"
    new = json.loads(report(study, tmp_path / "a", "json"))
    for key in {"provenance", "stages"} - old.keys():
        del new[key]
    file.write_text(json.dumps(kept(new, old), indent=1) + "\n", encoding="utf-8")
    page, file = sections(report(study, tmp_path / "b", "md")), EXPERIMENTS / study / "report.md"
    before = sections(file.read_text(encoding="utf-8"))
    kept_titles = [title for title in before if title in LEFT_OUT or title in page]
    titles = kept_titles + [title for title in page if title not in before and title not in LEFT_OUT]
    texts = {title: before[title] if title in LEFT_OUT else page[title] for title in titles}
    file.write_text("".join(f"## {t}\n{text}" if t else text for t, text in texts.items()), encoding="utf-8")


if __name__ == "__main__":
    import tempfile

    for study in STUDIES:
        with tempfile.TemporaryDirectory() as scratch:
            for part in ("a", "b"):
                (Path(scratch) / part).mkdir()
            write_again(study, Path(scratch))
