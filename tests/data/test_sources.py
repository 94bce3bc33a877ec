"""Files as they come: encodings, compression, JSON and CSV of every kind, folders; and where each row came from."""

import gzip
import json

import pytest

from tunevax.data import load_safety, load_task
from tunevax.data.sources import read_rows
from tunevax.errors import UsageError

ROWS = [{"prompt": f"How {i}, ü?", "chosen": f"no {i}", "rejected": f"yes {i}"} for i in range(3)]
JSONL = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
CSV = "prompt,chosen,rejected\n" + "".join(f'"{r["prompt"]}",{r["chosen"]},{r["rejected"]}\n' for r in ROWS)
COLUMNS = {key: [row[key] for row in ROWS] for key in ROWS[0]}


def fields(source):
    return [{k: row[k] for k in ROWS[0]} for row in load_safety(str(source), need=("chosen", "rejected"))]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", JSONL.encode("utf-8-sig")),
        ("a.jsonl", JSONL.replace("\n", "\r\n").encode("utf-16")),
        ("a.jsonl", JSONL.encode("utf-16-le")),
        ("a.jsonl", b"\n".join(line.encode("utf-8-sig") for line in JSONL.split("\n"))),
        ("a.json", json.dumps(ROWS).encode("utf-8-sig")),
        ("a.csv", CSV.encode("utf-8-sig")),
        ("a.csv", CSV.encode("utf-16")),
        ("A.CSV", CSV.encode()),
        ("a.jsonl.gz", gzip.compress(JSONL.encode())),
        ("a.csv.gz", gzip.compress(CSV.encode("utf-8-sig"))),
        ("a.json", JSONL.encode()),
        ("a.jsonl", json.dumps(ROWS, indent=2).encode()),
        ("a.json", json.dumps({"version": 2, "data": ROWS}, indent=2).encode()),
        ("a.json", json.dumps({"train": ROWS, "test": ROWS[:1]}).encode()),
        ("a.json", json.dumps(COLUMNS).encode()),
        ("a.json", json.dumps({key: dict(enumerate(values)) for key, values in COLUMNS.items()}).encode()),
        ("a.csv", ("sep=;\r\n" + CSV.replace(", ü", "§").replace(",", ";").replace("§", ", ü")).encode()),
        ("a.csv", CSV.replace(", ü", "§").replace(",", ";").replace("§", ", ü").encode()),
        ("a.tsv", CSV.replace(", ü", "§").replace(",", "\t").replace("§", ", ü").encode()),
        ("a.csv", ("\n" + CSV.replace("prompt,chosen", "prompt, chosen").replace("\n", ",,\n")).encode()),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_files_as_editors_and_libraries_write_them(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert fields(tmp_path / name) == ROWS


def test_the_place_of_a_row_is_its_line(tmp_path):
    def places(name, text):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return [place.removeprefix(f"{tmp_path}/{name}") for place, _ in read_rows(str(tmp_path / name))]

    assert places("a.jsonl", '{"a": "\u2028\x85"}\n\n{"a": 2}\n') == [":1", ":3"]
    assert places("a.json", '{"a": 1}\n{"a": 2}\n') == [":1", ":2"]
    assert places("b.json", '{"data": [{"a": 1}, {"a": 2}]}') == [".data[0]", ".data[1]"]
    assert places("a.csv", 'sep=;\na;b\n"x\ny";1\nz;2\n') == [":4", ":5"]
    for name, text, line in (
        ("a.jsonl", '{"a": 1\n{"a": 2}\n', 1),
        ("a.jsonl", '[\n{"a": 1},\n{"a": 2,}]', 3),
        ("a.json", '{"a": 1}\n{"a": 2\n', 2),
    ):
        with pytest.raises(UsageError, match=f"{name}:{line}: broken JSON"):
            places(name, text)


def test_long_csv_fields_are_read_and_stray_quotes_placed(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text(CSV + f'long?,no,"{"x" * 200_000}"\n')
    assert len(load_safety(str(file))[-1]["rejected"]) == 200_000
    for row, why in (('how?,"no,yes\n' + "a,b,c\n" * 40_000, "end of data"), ('how?,"no \\"x\\"",yes\n', "expected")):
        file.write_text("prompt,chosen,rejected\na,b,c\n" + row)
        with pytest.raises(UsageError, match=f"a.csv:3: broken CSV .*{why}.*written twice"):
            load_safety(str(file))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "a.csv",
            b"prompt,chosen\na,b\nh\xf6w,no\n",
            r"a.csv:3: not UTF-8 text \(byte 19 of the file\); save it as UTF-8",
        ),
        ("a.jsonl.gz", gzip.compress(JSONL.encode())[:-9], "a.jsonl.gz cannot be unpacked"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd00", "compressed with zstd; unpack it"),
        ("a.jsonl", b'{"prompt": "a", "prompt": "b", "chosen": "c"}', "a.jsonl:1: field 'prompt' occurs twice"),
        ("a.json", b'[{"prompt": "a", "chosen": "b", "chosen": "c"}]', r"a.json\[0\]: field 'chosen' occurs twice"),
        ("a.csv", b"prompt,chosen,prompt\na,b,c\n", "a.csv:2: field 'prompt' occurs twice.*SOURCE:prompt=COLUMN"),
        ("a.csv", b"prompt,chosen,split,split\na,b,x,y\n", "a.csv:2: field 'split' occurs twice"),
        ("a.jsonl", b'{"prompt": "a\\ud83d", "chosen": "c"}', r"a.jsonl:1: field 'prompt' .* position 2 .*'\\ud83d'"),
        ("a.jsonl", b'{"prompt": "a", "chosen": "c", "category": "\\udc00"}', "field 'category' .* half a character"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl:1: broken JSON .nested too deeply"),
        ("a.jsonl", b'{"prompt": "a", "chosen": NaN}', "a.jsonl:1: field 'chosen' is null"),
        (
            "a.json",
            b'{"val": [{"prompt": "a"}], "test": [{"prompt": "b"}]}',
            "has the splits val, test and no train.*rows=val",
        ),
        ("a.csv", b"how?,no\nwhy?,no\n", "a.csv:2: no field 'prompt'.*fields: how.*first line of a CSV names them"),
        ("a.jsonl", b'{"prompt": "a", "chosen": "c", "split": "trian"}', "a.jsonl:1: field 'split' is 'trian'"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else value[:24],
)
def test_what_cannot_be_read_is_one_sentence_with_the_place(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=said) as caught:
        load_safety(str(tmp_path / name), "alignment")
    assert "\n" not in str(caught.value)
    str(caught.value).encode()


def test_what_nobody_asks_for_does_no_harm(tmp_path):
    file = tmp_path / "a.jsonl"
    rest = f'"id": {"9" * 5000}, "x": "\\ud83d", "y": 1, "y": 2, "z": NaN, "meta": [{{"a": 1}}], "category": NaN'
    file.write_text('{"prompt": "a", "prompt": "a", "chosen": "b \\ud83d\\ude00", ' + rest + "}\n")
    (row,) = load_safety(str(file))
    assert (row["prompt"], row["chosen"], row["rejected"], row["category"]) == ("a", "b \U0001f600", None, None)
    (tmp_path / "a.csv").write_text("prompt,chosen,x,x,rejected\na,b,1,2,\n")
    assert load_safety(str(tmp_path / "a.csv"))[0]["rejected"] is None


def test_parquet_with_nested_types_and_equal_names(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]
    pq.write_table(pa.Table.from_pylist([{"messages": turns, "id": None}]), tmp_path / "a.parquet")
    (row,) = load_task(f"{tmp_path / 'a.parquet'}:split=all").rows
    assert (row["prompt"], row["completion"]) == ("q", "r")
    pq.write_table(pa.table([["a"], ["b"], ["c"]], names=["prompt", "prompt", "completion"]), tmp_path / "b.parquet")
    with pytest.raises(UsageError, match=r"b.parquet\[0\]: field 'prompt' occurs twice"):
        load_task(str(tmp_path / "b.parquet"))


@pytest.mark.slow
def test_folders_whatever_their_splits(tmp_path):
    import datasets

    rows = [{"prompt": f"q{i}", "completion": f"r{i}"} for i in range(4)]

    def prompts(name, options="split=all"):
        return [row["prompt"] for row in load_task(f"{tmp_path / name}:{options}").rows]

    def write(name, part):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("\n".join(map(json.dumps, part)), encoding="utf-8-sig")

    every, saved = [row["prompt"] for row in rows], datasets.Dataset.from_list(rows)
    talks = [
        {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": "r"}]}
        for row in rows
    ]
    datasets.Dataset.from_list(talks).with_format("numpy").save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"validation": saved, "test": saved.select([0])}).save_to_disk(tmp_path / "two")
    assert prompts("saved") == every
    assert prompts("two", "split=all,rows=test") == every[:1]
    assert prompts("two", "split=all,rows=validation[1:3]+test") == [*every[1:3], every[0]]
    write("only/test.jsonl", rows)
    assert prompts("only") == every
    write("parts/part-0.jsonl", rows[:2])
    write("parts/data.jsonl", rows[2:])  # no curation run
    assert sorted(prompts("parts")) == every
    write("none/validation.jsonl", rows)
    write("none/test.jsonl", rows)
    for name in ("two", "none"):
        with pytest.raises(UsageError, match=f"{name} has the splits validation, test and no train.*{name}:rows=valid"):
            prompts(name)
    with pytest.raises(UsageError, match="has no rows 'dev': it has the splits validation, test"):
        prompts("two", "rows=dev")
    write("mixed/a.jsonl", rows[:3])
    (tmp_path / "mixed" / "b.csv").write_text("prompt,completion\nq3,r3\n")
    with pytest.raises(UsageError, match=r"several kinds, of which only .jsonl would be read and .csv not"):
        prompts("mixed")
    write("two_configs/a.jsonl", rows)
    write("two_configs/b.jsonl", rows[:1])
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in "ab")
    (tmp_path / "two_configs" / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert prompts("two_configs", "split=all,config=b") == every[:1]
    with pytest.raises(UsageError, match=r"\['a', 'b'\].*two_configs:config=NAME"):
        prompts("two_configs")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="empty is a folder that cannot be read as a dataset"):
        prompts("empty")


def test_rows_of_a_file_can_be_a_slice(tmp_path):
    (tmp_path / "a.jsonl").write_text(JSONL)
    assert fields(f"{tmp_path / 'a.jsonl'}:rows=train[:2]") == ROWS[:2]
