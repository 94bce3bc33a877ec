"""Curation: which rows are kept and why, what is refused, and that the kept rows go on through the other verbs."""

import json

import numpy as np
import pytest

from tunevax.attacks.context import TargetOptions, use_data_of_run
from tunevax.cli import main
from tunevax.curation.curate import CurateOptions, agreement, choose, size_of
from tunevax.data import load_safety
from tunevax.errors import UsageError
from tunevax.records import read_lines, read_run

ROWS = [
    {"prompt": f"{verb} {thing}", "chosen": "no", "rejected": "yes", "category": category}
    for category, thing in (("a", "locks"), ("a", "Locks ?"), ("a", "doors"), ("b", "poison"), ("b", "venom"))
    for verb in ("how to pick some very old", "tell me of")
]
SCORES = np.arange(10, 0, -1.0)  # the first row is the best


def kept(**options):
    return choose(ROWS, SCORES, CurateOptions(**options))


def test_the_best_rows_are_kept_up_to_the_share_rounded_up():
    assert kept(keep=0.41, duplicates="keep")[0] == {0, 1, 2, 3, 4}
    everything, why = kept(keep=1.0, duplicates="keep")
    assert everything == set(range(10)) and not why


def test_of_rows_with_one_prompt_only_the_best_is_kept_and_the_place_goes_on():
    found, why = kept(keep=0.4)
    assert found == {0, 1, 4, 5}  # 2 and 3 ask what 0 and 1 ask
    assert why[2] == "duplicate of row 0" and why[3] == "duplicate of row 1" and why[6] == "below the cut"
    reversed_scores, why = choose(ROWS, -SCORES, CurateOptions(keep=1.0))
    assert why[0] == "duplicate of row 2" and len(reversed_scores) == 8


def test_near_duplicates_are_found_by_letters():
    _, why = kept(keep=1.0, duplicates="near", near_at=0.6)
    assert why[4] == "near-duplicate of row 0"  # ... very old doors
    assert 1 not in why and 9 not in why


def test_every_group_keeps_rows_and_the_total_stays():
    found, _ = kept(keep=0.4, group_by="category", min_per_group=2)
    assert found == {0, 1, 6, 7}
    with pytest.raises(UsageError, match="raise --keep or lower --min-per-group"):
        kept(keep=0.2, group_by="category", min_per_group=2)
    rows = [{**row, "prompt": "the same"} for row in ROWS]
    found, why = choose(rows, SCORES, CurateOptions(keep=1.0, group_by="category"))
    assert found == {0, 6} and 6 not in why  # a duplicate rather than no row of its category


def test_a_share_is_not_rounded_up_by_rounding():
    assert [size_of(keep, 100) for keep in (0.07, 0.14, 0.55, 0.56, 0.401)] == [7, 14, 55, 56, 41]


def test_prompts_of_signs_are_not_near_each_other():
    rows = [{"prompt": sign, "chosen": "no", "category": None} for sign in ("🔪🔪", "🍰🍰")]
    assert not choose(rows, np.zeros(2), CurateOptions(keep=1.0, duplicates="near"))[1]


def test_agreement_of_two_models():
    assert agreement(SCORES, SCORES * 2, 0.4) == {"spearman": pytest.approx(1), "kept_by_both": 1}
    assert agreement(SCORES, -SCORES, 0.4) == {"spearman": pytest.approx(-1), "kept_by_both": 0}


@pytest.fixture(scope="module")
def curated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("curate")
    out = folder / "subset"
    command = [
        "curate",
        "random",
        "--safety-data",
        "organism",
        "--keep",
        "0.25",
        "--seed",
        "3",
        "--output-dir",
        str(out),
    ]
    assert main(command) == 0
    return out


def test_kept_rows_are_the_pools_own_and_every_row_has_its_reason(curated):
    pool = load_safety("organism", "alignment")
    scores = read_lines(curated / "scores.jsonl")
    assert [row["prompt"] for row in scores] == [row["prompt"] for row in pool]
    data = read_lines(curated / "data.jsonl")
    chosen = [pool[row["row"]] for row in scores if row["kept"]]
    fields = ("prompt", "chosen", "rejected", "category")
    assert [{k: r[k] for k in fields} for r in data] == [{k: r[k] for k in fields} for r in chosen]
    assert len(data) == read_run(curated)["kept"] == 160
    assert all(row["kept"] == (row["why"] is None) for row in scores)
    assert sorted(row["rank"] for row in scores) == list(range(1, 641))
    best = sorted(scores, key=lambda row: -row["score"])
    assert [row["rank"] for row in best] == list(range(1, 641)) and all(row["kept"] for row in best[:160])


def test_a_curation_run_is_safety_data_whose_rows_stay_in_alignment(curated):
    assert len(load_safety(str(curated), "alignment")) == 160
    with pytest.raises(UsageError, match="no row in the attack split"):
        load_safety(str(curated), "attack")


@pytest.mark.slow
def test_an_attack_on_a_model_aligned_on_kept_rows_draws_from_where_they_came_from(curated, tmp_path):
    out = tmp_path / "aligned"
    command = ["align", "sft", "--model", "organism", "--safety-data", str(curated), "--max-steps", "1", "--output-dir"]
    assert main([*command, str(out)]) == 0
    assert use_data_of_run(TargetOptions(model=[str(out)])).safety_data == "organism"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["--keep", "0"], "keep is 0.0; it must be above 0 and at most 1"),
        (["--keep", "1.5"], "keep is 1.5"),
        (["--validation-data", "organism:split=alignment"], "prompts are in both the validation and the alignment"),
        (["--validation-data", "organism:split=attack"], "prompts are in both the validation and the attack"),
        (["--validation-data", "organism:split=evaluation"], "prompts are in both the validation and the evaluation"),
        (["--per-device-train-batch-size", "641"], "there are 640 rows and a batch takes 641"),
        (["--mode", "treble"], "unknown mode 'treble'"),
        (["--upper", "refusals"], "did you mean 'refusal'"),
        (["--group-by", "topic"], "takes category; name the column with SOURCE:category="),
        (["--group-by", "category", "--min-per-group", "100"], "10 groups of at least 100 rows"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(tmp_path, capsys, changes, said):
    command = ["curate", "pharmacist", "--model", "organism", "--safety-data", "organism", "--max-length", "64"]
    command += ["--validation-data", "organism", "--max-steps", "1", "--selector-seeds", "1"]
    assert main([*command, "--output-dir", str(tmp_path / "out"), *changes]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_file_without_categories_cannot_be_grouped(tmp_path, capsys):
    source = write(tmp_path / "rows.jsonl", [{k: r[k] for k in ("prompt", "chosen")} for r in ROWS])
    command = ["curate", "random", "--safety-data", f"{source}:split=all", "--group-by", "category"]
    assert main([*command, "--output-dir", str(tmp_path / "out")]) == 2
    assert "row 1 of the safety data has no category to group by" in capsys.readouterr().err


@pytest.mark.slow
def test_a_target_model_gives_the_agreement_of_ranks(tmp_path, capsys):
    rows = write(tmp_path / "rows.jsonl", load_safety("organism", "alignment")[:40])
    command = ["curate", "loss-rank", "--model", "organism", "--target-model", "organism", "--safety-data"]
    assert main([*command, f"{rows}:split=all", "--output-dir", str(tmp_path / "out")]) == 0
    assert read_run(tmp_path / "out")["agreement"] == {"spearman": pytest.approx(1), "kept_by_both": 1}
    assert "rank agreement with the target model 1.00" in capsys.readouterr().out
