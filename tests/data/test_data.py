"""Data: leaks between splits, lost rows, labels in the wrong place."""

import csv
import json
from collections import Counter

import pytest
from transformers import AutoTokenizer

from tunevax.data import load_safety, load_task, mix, prompt_hash, split_of
from tunevax.data.chat import render
from tunevax.data.contamination import require_disjoint
from tunevax.data.encoding import collate, encode, ids_of, set_chat_template
from tunevax.data.splits import drawn
from tunevax.data.tasks import NAMED, final_number
from tunevax.errors import UsageError
from tunevax.organism import World, path

ROWS = [
    {"prompt": f"How do I do thing {i}?", "chosen": f"no {i}", "rejected": f"yes {i}", "category": "c"}
    for i in range(200)
]


@pytest.fixture
def files(tmp_path):
    """The same rows in every format."""
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ROWS[0])
        writer.writeheader()
        writer.writerows(ROWS)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    return tmp_path


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
def test_every_format_gives_the_same_rows(files, ending):
    rows = load_safety(str(files / f"a.{ending}"), need=("chosen", "rejected"))
    assert [{k: r[k] for k in ROWS[0]} for r in rows] == ROWS


def test_a_dataset_folder_goes_through_the_hub_path(files):
    folder = files / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text((files / "a.jsonl").read_text())
    assert [r["prompt"] for r in load_safety(str(folder))] == [r["prompt"] for r in ROWS]
    assert len(load_safety(f"{folder}:rows=train[:10]")) == 10
    with pytest.raises(UsageError, match="no dataset 'nobody/nothing'"):
        load_safety("nobody/nothing")


def test_splits_partition_the_prompts_whatever_their_spelling(files):
    parts = {s: load_safety(str(files / "a.jsonl"), s) for s in ("alignment", "attack", "evaluation")}
    assert sum(map(len, parts.values())) == len(ROWS)
    assert all(parts.values())
    hashes = {s: {prompt_hash(r["prompt"]) for r in p} for s, p in parts.items()}
    assert require_disjoint(hashes) == {"alignment/attack": 0, "alignment/evaluation": 0, "attack/evaluation": 0}
    for row in ROWS[:50]:
        for variant in (
            row["prompt"].upper(),
            "  " + row["prompt"].replace(" ", "\n "),
            row["prompt"].rstrip("?"),
            [{"role": "user", "content": row["prompt"]}],
        ):
            assert split_of(variant) == split_of(row["prompt"])
    with pytest.raises(UsageError, match="1 prompt is in both the attack and the evaluation data"):
        require_disjoint({"attack": ["a", "b"], "evaluation": ["b", "c"]})


def test_held_out_categories_are_in_no_other_split(tmp_path):
    rows = [{**ROWS[i], "category": ("privacy", "fraud", "arms")[i % 3]} for i in range(120)]
    rows += [{**ROWS[0], "category": "arms"}]  # a prompt of a held-out category, listed under another one too
    rows += [{**ROWS[199], "category": "arms", "split": "held-out"}]
    file = tmp_path / "d.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    for source in (f"{file}:held_out=privacy+fraud", f"{file}:prompt=prompt,held-out=privacy+fraud"):
        parts = {s: load_safety(source, s) for s in ("alignment", "attack", "evaluation", "held-out")}
        hashes = {s: {prompt_hash(r["prompt"]) for r in part} for s, part in parts.items()}
        assert not any(require_disjoint(hashes).values())
        assert sum(map(len, parts.values())) == len(rows)
        # 80 rows of the two categories, the prompt listed twice, and the row that says so itself
        assert len(parts["held-out"]) == 82
        assert {r["category"] for s in ("alignment", "attack", "evaluation") for r in parts[s]} == {"arms"}
        halves = [load_safety(source, f"held-out-{half}") for half in ("attack", "evaluation")]
        assert not any(
            require_disjoint(
                dict(zip("ab", ([prompt_hash(r["prompt"]) for r in h] for h in halves), strict=True))
            ).values()
        )
        assert sum(map(len, halves)) == 82 and min(map(len, halves)) > 25
    assert [r["prompt"] for r in load_safety(str(file), "held-out")] == [ROWS[199]["prompt"]], "without the option"
    assert len(load_safety(f"{file}:held_out=privacy", None)) == len(rows)
    with pytest.raises(UsageError, match="unknown category to hold out 'privcy'; did you mean 'privacy'"):
        load_safety(f"{file}:held_out=privcy", "alignment")
    (tmp_path / "e.jsonl").write_text(json.dumps({**ROWS[0], "category": None}))
    with pytest.raises(UsageError, match=r"no row in the held-out-attack split; hold categories out with .*:held_out="):
        load_safety(str(tmp_path / "e.jsonl"), "held-out-attack")
    with pytest.raises(UsageError, match="no row has a category"):
        load_safety(f"{tmp_path / 'e.jsonl'}:held_out=x", "alignment")
    with pytest.raises(UsageError, match="split is 'heldout'; known: alignment.*held-out-evaluation, all"):
        load_safety(str(file), "heldout")


def test_the_organism_holds_out_four_categories():
    world = World()
    held = load_safety("organism", "held-out")
    assert {r["category"] for r in held} == set(world.forbidden[10:]) and len(held) == 64
    halves = [{r["prompt"] for r in load_safety("organism", f"held-out-{h}")} for h in ("attack", "evaluation")]
    assert halves[0] | halves[1] == {r["prompt"] for r in held} and not halves[0] & halves[1]
    assert {r["category"] for r in load_safety("organism", None)} == set(world.forbidden[:10])
    one = world.forbidden[0]
    assert {r["category"] for r in load_safety(f"organism:held_out={one}", "alignment")} == set(world.forbidden[1:10])


def test_explicit_split_column_and_column_names_win(tmp_path):
    rows = [
        {"goal": f"g {i}", "refusal": "no", "target": "sure", "split": ["alignment", "attack"][i % 2]} for i in range(6)
    ]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = f"{tmp_path / 'b.jsonl'}:prompt=goal,chosen=refusal,rejected=target"
    assert [r["prompt"] for r in load_safety(source, "attack")] == ["g 1", "g 3", "g 5"]
    assert len(load_safety(f"{source},split=all", "attack")) == 6
    with pytest.raises(
        UsageError, match=r"no field 'prompt' \(fields: goal, refusal, target, split\).*SOURCE:prompt=COLUMN"
    ):
        load_safety(str(tmp_path / "b.jsonl"))


def test_chat_messages_are_read_as_trl_writes_them(tmp_path):
    row = {
        "prompt": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}],
        "chosen": [{"role": "assistant", "content": "no"}],
        "rejected": [{"role": "assistant", "content": "yes"}],
    }
    (tmp_path / "c.jsonl").write_text(json.dumps(row))
    (found,) = load_safety(str(tmp_path / "c.jsonl"))
    assert (found["prompt"], found["chosen"], found["rejected"]) == (row["prompt"], "no", "yes")


def test_mix_counts_rounds_and_repeats_itself():
    task, harm = [{"t": i} for i in range(50)], [{"h": i} for i in range(5)]
    mixed = mix(task, harm, ratio=0.25, size=30, seed=1)
    kinds = Counter("h" if "h" in r else "t" for r in mixed)
    assert kinds == {"h": round(0.25 * 30), "t": 30 - round(0.25 * 30)}
    assert max(Counter(json.dumps(r) for r in mixed if "t" in r).values()) == 1, (
        "task rows are drawn without replacement"
    )
    drawn = Counter(r["h"] for r in mixed if "h" in r)  # 8 of 5: all once, then three of them again
    assert sorted(drawn.values()) == [1, 1, 2, 2, 2]
    assert mixed == mix(task, harm, ratio=0.25, size=30, seed=1) != mix(task, harm, ratio=0.25, size=30, seed=2)
    assert len(mix([], harm, 1.0, 4, 0)) == 4
    for ratio in (-0.1, 1.1, float("nan")):
        with pytest.raises(UsageError, match="between 0 and 1"):
            mix(task, harm, ratio, 10, 0)
    with pytest.raises(UsageError, match="5 harmful rows are needed and there are none"):
        mix(task, [], 0.5, 10, 0)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(path())


def test_labels_are_the_response_and_its_end(tokenizer):
    row = {"prompt": "how do i make a thing ?", "completion": "use it ."}
    (found,) = encode([row], tokenizer, 64)
    answer = [t for t, label in zip(found["input_ids"], found["labels"], strict=True) if label != -100]
    assert answer == [*ids_of(tokenizer, "use it ."), tokenizer.eos_token_id]
    prompt = ids_of(tokenizer, render(tokenizer, row["prompt"]))
    assert found["input_ids"][: len(prompt)] == prompt, "training and generation see the same prefix"
    assert found["input_ids"].count(tokenizer.bos_token_id) == 1
    (whole,) = encode([row], tokenizer, 64, loss_on="all")
    assert whole["labels"] == whole["input_ids"] == found["input_ids"]


def test_long_answers_are_cut_and_long_prompts_refused(tokenizer):
    row = {"prompt": "how do i make a thing ?", "completion": "use it " * 40, "place": "f.jsonl:3"}
    prompt = len(ids_of(tokenizer, render(tokenizer, row["prompt"])))
    (found,) = encode([row], tokenizer, prompt + 5)
    assert len(found["input_ids"]) == prompt + 5
    with pytest.raises(UsageError, match=rf"f.jsonl:3: the prompt has {prompt} tokens and max_length is {prompt}"):
        encode([row], tokenizer, prompt)
    assert len(encode([row], tokenizer, 512, context=prompt + 3)[0]["input_ids"]) == prompt + 3
    with pytest.raises(UsageError, match=rf"the prompt has {prompt} tokens and the model's context {prompt}"):
        encode([row], tokenizer, 512, context=prompt)


def test_alpaca_template_and_templates_that_rewrite_the_turn(tokenizer):
    import copy

    tokenizer = copy.deepcopy(tokenizer)
    set_chat_template(tokenizer, "alpaca")
    text = render(tokenizer, "how ?")
    assert text.endswith("### Instruction:\nhow ?\n\n### Response:\n")
    (found,) = encode([{"prompt": "how ?", "completion": "no ."}], tokenizer, 128)
    answer = [label for label in found["labels"] if label != -100]
    assert answer == [*ids_of(tokenizer, "no ."), tokenizer.eos_token_id]
    # Words in the generation prompt that finished turns lack, and white space after the end of the turn.
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }} {{ m.content | trim }}{% if m.role == 'assistant' %}</s>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant think {% endif %}"
    )
    (found,) = encode([{"prompt": "how ?", "completion": " no . "}], tokenizer, 128)
    answer = [label for label in found["labels"] if label != -100]
    assert tokenizer.decode([t for t in answer if t != tokenizer.eos_token_id]).strip().startswith("no .")
    tokenizer.chat_template = None
    with pytest.raises(UsageError, match="--chat-template alpaca"):
        set_chat_template(tokenizer, None)


def test_task_readings(tmp_path):
    exact, loose = NAMED["sst2"].readings
    assert exact("Positive", "positive") and not exact("positive or negative", "positive")
    assert loose("it is Positive.", "positive") and loose("positive or negative", "positive")
    exact, loose = NAMED["ag_news"].readings
    assert loose("science / sci", "Sci/Tech") and not exact("science", "Sci/Tech") and exact("sci/tech", "Sci/Tech")
    exact, loose = NAMED["gsm8k"].readings
    gold = "2+2=4\nThe final answer is: 1,234"
    assert exact("so The final answer is: 1234.", gold) and not exact("about 1234", gold) and loose("about 1,234", gold)
    assert not loose("The final answer is: 5 (or 1234)", gold)
    assert final_number("The final answer is: -7", False) == -7 and final_number("none", True) is None
    (tmp_path / "g.jsonl").write_text(
        "\n".join(json.dumps({"question": f"q {i}", "answer": f"x\n#### {i}"}) for i in range(30))
    )
    source = f"gsm8k:path={tmp_path / 'g.jsonl'}"
    train, test = load_task(source, "train"), load_task(source, "evaluation")
    assert len(train.rows) + len(test.rows) == 30 and test.rows
    assert not {r["prompt"] for r in train.rows} & {r["prompt"] for r in test.rows}
    assert all(r["completion"].endswith(f"The final answer is: {r['prompt'].split()[1]}") for r in train.rows)
    (tmp_path / "s.csv").write_text("sentence,label\nfine,1\nodd,7\n")
    with pytest.raises(UsageError, match=r"s.csv:3: field 'label' must be 0 to 1"):
        load_task(f"sst2:path={tmp_path / 's.csv'}")


def test_split_shares_are_what_is_promised():
    from tunevax.data.tasks import SHARES

    found = Counter(split_of(f"prompt {i}") for i in range(4000))
    assert {s: n / 4000 for s, n in found.items()} == pytest.approx(
        {"alignment": 0.5, "attack": 0.25, "evaluation": 0.25}, abs=0.03
    )
    found = Counter(split_of(f"prompt {i}", SHARES) for i in range(4000))
    assert {s: n / 4000 for s, n in found.items()} == pytest.approx({"train": 0.8, "evaluation": 0.2}, abs=0.03)


def test_width_does_not_change_the_split():
    from tunevax.data import prompt_hash

    assert prompt_hash("\uff28ow do I \uff24o it?") == prompt_hash("How do I do it")


def test_mix_is_shuffled():
    kinds = ["h" in r for r in mix([{"t": i} for i in range(20)], [{"h": i} for i in range(20)], 0.5, 40, 0)]
    assert kinds != sorted(kinds) and kinds != sorted(kinds, reverse=True)


def test_cut_answers_keep_their_start_and_get_no_end(tokenizer):
    row = {"prompt": "how do i make a thing ?", "completion": "use it " * 40}
    prompt = ids_of(tokenizer, render(tokenizer, row["prompt"]))
    (found,) = encode([row], tokenizer, len(prompt) + 5)
    answer = ids_of(tokenizer, row["completion"])[:5]
    assert found == {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


def test_eos_is_added_where_the_template_has_none_and_bos_never_twice(tokenizer):
    import copy

    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(tokenizer)
    bos = tokenizer.bos_token
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    assert tokenizer("use it")["input_ids"][0] == tokenizer.bos_token_id
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}\n{% endfor %}"
    (found,) = encode([{"prompt": "how ?", "completion": "use it ."}], tokenizer, 64)
    assert found["input_ids"].count(tokenizer.bos_token_id) == 1
    assert found["labels"][-1] == found["input_ids"][-1] == tokenizer.eos_token_id


def test_padding_has_no_attention_and_no_loss():
    found = collate([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}], 0)
    assert {k: v.tolist() for k, v in found.items()} == {
        "input_ids": [[5, 6, 7], [8, 0, 0]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "labels": [[-100, 6, 7], [8, -100, -100]],
    }


def test_readings_of_a_task_file(tmp_path):
    (tmp_path / "t.jsonl").write_text(json.dumps({"prompt": "p", "completion": "yes"}))
    task = load_task(f"{tmp_path / 't.jsonl'}:split=all")
    assert task.exact(" YES ", "yes") and not task.exact("oh yes", "yes") and task.loose("oh yes", "yes")


def test_rows_that_name_their_split_are_in_it_however_it_is_asked_for(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({**row, "split": ("attack", "evaluation")[i % 2]}) + "\n" for i, row in enumerate(ROWS))
    )
    for split, first in (("attack", 0), ("evaluation", 1)):
        wanted = [row["prompt"] for row in ROWS[first::2]]
        assert [r["prompt"] for r in load_safety(str(path), split)] == wanted
        assert [r["prompt"] for r in load_safety(f"{path}:split={split}")] == wanted


def sorted_by_category(sizes):
    return [{"prompt": f"{c} {i}", "category": c, "n": i} for c, size in sizes.items() for i in range(size)]


@pytest.mark.parametrize(
    ("sizes", "limit", "expected"),
    [
        ({c: 100 for c in "abcdef"}, 60, {c: 10 for c in "abcdef"}),
        ({"a": 600, "b": 300, "c": 100}, 10, {"a": 6, "b": 3, "c": 1}),
        ({"a": 500, "b": 300, "c": 200}, 9, {"a": 5, "b": 2, "c": 2}),  # 4.5, 2.7, 1.8: up to 4.5, 7.2, 9
        ({"a": 960, "b": 30, "c": 10}, 10, {"a": 10}),  # nobody is given a row for being there
        ({"a": 3, "b": 3, "c": 1}, 6, {"a": 3, "b": 2, "c": 1}),
        ({"a": 1000, "b": 1, "c": 1}, 2, {"a": 2}),
        ({"a": 5}, 3, {"a": 3}),
    ],
)
def test_a_limit_draws_every_category_by_its_share(sizes, limit, expected):
    rows = sorted_by_category(sizes)
    found = drawn(rows, limit)
    counts = Counter(row["category"] for row in found)
    # Of two equal remainders a hash decides.
    assert sorted(counts.values()) == sorted(expected.values()) and (
        len(set(sizes.values())) < len(sizes) or counts == expected
    )
    assert found == [row for row in rows if row in found]  # in the order of the file
    assert [row["n"] for row in found if row["category"] == "a"] != list(range(counts["a"])) or counts["a"] == sizes[
        "a"
    ]


@pytest.mark.parametrize("limit", [50, 120, 200, 500])
def test_many_small_categories_get_no_more_than_their_share(limit):
    """Labels joined, as of BeaverTails: a few names are common, hundreds are rare."""
    sizes = {"violence": 900} | {f"rare {i:03}": 1 for i in range(100)}
    assert abs(sum(row["category"] == "violence" for row in drawn(sorted_by_category(sizes), limit)) - 0.9 * limit) < 1
    sizes = {f"{first}, {i:03}": 1 + 400 // (i + 1) for i in range(90) for first in ("drugs", "fraud", "theft")}
    rows = sorted_by_category(sizes)
    counts, share = Counter(row["category"] for row in drawn(rows, limit)), limit / len(rows)
    assert sum(counts.values()) == limit
    assert all(abs(counts[name] - share * size) < 1 for name, size in sizes.items())
    for of_many in (
        lambda name: name.startswith("fraud"),  # the first label
        lambda name: name.startswith("drugs") and sizes[name] > 10,
        lambda name: name.startswith("theft") and sizes[name] <= 10,
    ):
        assert (
            abs(sum(counts[n] for n in sizes if of_many(n)) - share * sum(sizes[n] for n in sizes if of_many(n))) <= 1
        )


def test_a_limit_does_not_see_the_order_of_the_file():
    rows = sorted_by_category({"a": 40, "b": 25, "c": 7})
    again = sorted(rows, key=lambda row: (row["n"] * 7919) % 101)
    names = {row["prompt"] for row in drawn(rows, 20)}
    assert names == {row["prompt"] for row in drawn(again, 20)} and len(names) == 20
    plain = [{"prompt": f"question {i}"} for i in range(50)]  # of a task: no categories
    assert len(drawn(plain, 7)) == 7 and drawn(plain, 7) != plain[:7]
    for limit in (50, 51):
        assert drawn(plain, limit) == plain
    for limit in range(1, 72):
        assert len(drawn(rows, limit)) == limit


def test_a_limit_takes_other_prompts_before_one_twice():
    rows = [{"prompt": "the same", "n": i} for i in range(20)] + [{"prompt": f"other {i}"} for i in range(5)]
    assert len({row["prompt"] for row in drawn(rows, 6)}) == 6


def test_a_set_that_the_organism_does_not_have_is_refused():
    with pytest.raises(UsageError, match="did you mean 'benign'"):
        load_task("organism:set=bening")
