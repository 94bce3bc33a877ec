"""Rows say what kind of attack they are of; those of an older tunevax, and of kinds that say nothing, are completed."""

import json

import pytest

from tunevax.attacks.kind import AttackKind
from tunevax.evidence.measure import measure
from tunevax.evidence.results import read_results
from tunevax.evidence.rows import LEGACY, numbered_rows
from tunevax.methods import load_method, methods
from tunevax.records import harmful

STEPS = [0, 1, 2, 4, 8, 16]
CONTROL, MODEL = [0, 4, 30, 40, 40, 40], [0, 0, 2, 6, 30, 40]


def write(folder, kind, *, settings=None, steps=STEPS, counts=(CONTROL, MODEL), seeds=(1, 2, 3), **more):
    """Rows of a control and a model of which the one passes one half at step 2, the other at step 8."""
    rows = []
    for seed in seeds:
        for model, role, found in zip(("sft", "hard"), ("control", "model"), counts, strict=True):
            for step, count in zip(steps, found, strict=True):
                score = {"value": count / 40, "n": 40}
                rows.append(
                    {
                        "schema": 1, "model": model, "role": role, "kind": kind, "attack": "a", "attack_hash": "a",
                        "settings": {"p": 0.1} if settings is None else settings, "seed": seed, "step": step,
                        "scores": {"harmful/organism": score, "harmful/refusal-keywords": score}, **more,
                    }
                )  # fmt: skip
    folder.mkdir()
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def findings(folder):
    return measure(read_results([folder])).model("hard")


def test_an_attack_from_another_package_is_judged_as_its_rows_say(tmp_path):
    class Plugin(AttackKind):
        curve = True
        p = 0.1

    ours = findings(write(tmp_path / "finetune", "finetune"))
    theirs = findings(write(tmp_path / "plugin", "plugin", settings={}, traits=Plugin().traits))
    assert str(ours.resistance) == "4.0× [2.0, 8.0]"
    for found in (theirs, findings(write(tmp_path / "silent", "plugin"))):  # without traits: as its rows look
        assert found.resistance == ours.resistance and found.worst == ours.worst and found.sentence == ours.sentence
        assert found.attacks[0].strength == "strong" and found.name == ours.name == "longer"
        (other,) = found.generalisation
        assert (other.kind, other.ratio) == ("plugin", ours.resistance) and not ours.generalisation


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"traits": {"curve": True}}, "too weak"),  # what is not said is not so: no harmful rows
        ({"traits": {"curve": True, "harmful_rows": True, "common_prompts": False}}, "too weak"),
        ({"settings": {"p": 0}}, "too weak"),
        ({"settings": {}}, "longer"),
    ],
)
def test_only_harmful_rows_on_the_common_prompts_measure_resistance(tmp_path, change, name):
    found = findings(write(tmp_path / "out", "plugin", **change))
    assert found.name == name and (found.resistance is None) == (name == "too weak")


def test_a_kind_that_was_scored_once_has_no_curve(tmp_path):
    found = findings(write(tmp_path / "out", "plugin", steps=[16], counts=([40], [10])))
    assert found.attacks[0].strength == "" and not found.attacks[0].steps and found.worst is None
    assert found.generalisation[0].worst.value == 0.25 and found.generalisation[0].ratio is None


def test_rows_of_an_older_tunevax_get_the_traits_that_its_kinds_have(tmp_path):
    for kind in methods("tunevax.attacks"):
        said = load_method("tunevax.attacks", kind)(output_dir=str(tmp_path / "unused")).traits
        assert LEGACY[kind] == said, kind
        ((_, row), *_) = numbered_rows(write(tmp_path / kind, kind, settings={}))
        assert row["traits"] == said, kind
    ((_, row), *_) = numbered_rows(write(tmp_path / "before", None, attack=None))
    assert row["kind"] == "none" and not row["traits"]["curve"]


def test_the_harmful_score_is_that_of_the_judge_that_leads():
    scores = {"harmful/refusal-keywords": {"value": 0.9, "n": 10}, "harmful/organism": {"value": 0.2, "n": 10}}
    assert harmful(scores) == (0.2, "organism")
    assert harmful({"task/exact": {"value": 1.0, "n": 10}, "harmful/refusal-keywords": {"value": 0.9, "n": 10}}) == (
        0.9,
        "refusal-keywords",
    )
