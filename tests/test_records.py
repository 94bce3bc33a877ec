import json

import pytest

from tunevax.errors import UsageError
from tunevax.records import SCHEMA, data_entry, is_share, read_lines, read_prompts, read_run


@pytest.mark.parametrize("content", ["{", "[]", '"text"', ""])
def test_a_damaged_record_is_named(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(UsageError, match="run.json cannot be read as a JSON object; the run folder is damaged"):
        read_run(tmp_path)


def test_older_records_are_read_and_newer_ones_refused(tmp_path):
    (tmp_path / "run.json").write_text('{"verb": "align"}')  # from before there was a schema
    assert read_run(tmp_path) == {"verb": "align"} and read_prompts(tmp_path) == {}
    (tmp_path / "run.json").write_text(json.dumps({"schema": SCHEMA + 1}))
    with pytest.raises(UsageError, match=f"has schema {SCHEMA + 1} .* upgrade tunevax"):
        read_run(tmp_path)


def test_lines_hold_any_text_and_a_cut_line_is_named(tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [{"text": "a\u2028b"}, {"text": "c"}]
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert read_lines(file) == rows and read_lines(tmp_path / "none.jsonl") == []
    file.write_text('{"a": 1}\n\n[1]\n')
    with pytest.raises(UsageError, match="rows.jsonl line 3 is cut off or not a JSON object"):
        read_lines(file)


def test_a_dataset_is_the_same_wherever_it_is_read_from():
    rows = [{"prompt": "p", "category": "b", "read_as": "pairs"}, {"prompt": "p", "category": "a"}, {"prompt": "q"}]
    entry = data_entry("alignment", "x.jsonl", [{**row, "place": f"x:{i}"} for i, row in enumerate(rows)])
    assert entry == {**data_entry("alignment", "x.jsonl", rows)} and entry["categories"] == ["a", "b"]
    assert (entry["rows"], entry["distinct"], entry["read_as"]) == (3, 3, {"pairs": 1})
    assert "categories" not in data_entry("task", "x.jsonl", rows)


def test_what_is_a_share():
    shares = (
        "harmful/organism",
        "judged/x",
        "task/exact",
        "utility/gsm8k",
        "degenerate",
        "over-refusal",
        "same-answer",
    )
    assert all(map(is_share, shares)) and not any(map(is_share, ("perplexity/text", "lm-eval/mmlu/acc", "metric/x")))
