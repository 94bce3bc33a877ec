"""The shapes of rows: which answer belongs to which question, and what is refused because that is unclear."""

import json

import pytest

from tunevax.data import load_safety, load_task
from tunevax.data.shapes import read_example, read_pair
from tunevax.errors import UsageError
from tunevax.records import data_entry

BOTH = ("chosen", "rejected")


def u(text):
    return {"role": "user", "content": text}


def a(text):
    return {"role": "assistant", "content": text}


def s(text):
    return {"role": "system", "content": text}


def hh(*turns):
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {turn}" for i, turn in enumerate(turns))


def pair(row, need=BOTH, **options):
    found = read_pair("f:1", row, options, need, "align x")
    return found["prompt"], found["chosen"], found["rejected"], found["read_as"]


def example(row, **options):
    found = read_example("f:1", row, options)
    return found["prompt"], found["completion"], found["read_as"]


CONTEXT = [u("q"), a("1"), u("q2")]


@pytest.mark.parametrize(
    ("row", "prompt", "read_as"),
    [
        ({"prompt": "q", "chosen": "no", "rejected": "yes"}, "q", "prompt, chosen, rejected"),
        ({"prompt": CONTEXT, "chosen": [a("no")], "rejected": "yes"}, CONTEXT, "prompt, chosen, rejected"),
        (
            {"chosen": [u("q"), a("no")], "rejected": [u("q"), a("yes")]},
            "q",
            "chosen, rejected (implicit prompt)",
        ),
        (
            {"chosen": [*CONTEXT, a("no")], "rejected": [*CONTEXT, a("yes"), u("more")]},
            CONTEXT,
            "chosen, rejected (implicit prompt); turns after the answer left out",
        ),
        (
            {"system": "be", "chosen": [u("q"), a("no")], "rejected": [u("q"), a("yes")]},
            [s("be"), u("q")],
            "system, chosen, rejected (implicit prompt)",
        ),
        (
            {"prompt": "q", "messages": [u("q"), a("no")], "chosen": [u("q"), a("no")], "rejected": [u("q"), a("yes")]},
            "q",
            "prompt, chosen, rejected",
        ),
        ({"prompt": "q2", "chosen": [*CONTEXT, a("no")], "rejected": [*CONTEXT, a("yes")]}, CONTEXT, None),
        ({"prompt": "q", "chosen": [*CONTEXT, a("no")], "rejected": [*CONTEXT, a("yes")]}, CONTEXT, None),
        (
            {"prompt": "q", "chosen": [a("no"), u("thanks")], "rejected": [a("yes")]},
            "q",
            "prompt, chosen, rejected; turns after the answer left out",
        ),
        (
            {
                "conversations": [{"from": "human", "value": "q"}],
                "chosen": {"from": "gpt", "value": "no"},
                "rejected": {"from": "gpt", "value": "yes"},
            },
            "q",
            "conversations, chosen, rejected",
        ),
        (
            {"instruction": "q", "input": "on this", "chosen": "no", "rejected": "yes"},
            "q\n\non this",
            "instruction + input, chosen, rejected",
        ),
        (
            {"system": "be", "question": "q", "chosen": "no", "rejected": "yes"},
            [s("be"), u("q")],
            "system + question, chosen, rejected",
        ),
        (
            {"input": {"messages": [u("q")]}, "preferred_output": [a("no")], "non_preferred_output": [a("yes")]},
            "q",
            "OpenAI preference",
        ),
        ({"chosen": hh("q", "1", "q2", "no"), "rejected": hh("q", "1", "q2", "yes")}, CONTEXT, None),
        ({"prompt": hh("q", "1", "q2", ""), "chosen": "no", "rejected": "yes"}, CONTEXT, "prompt, chosen, rejected"),
        (
            {
                "prompt": "q",
                "response_0": "yes",
                "response_1": "no",
                "is_response_0_safe": False,
                "is_response_1_safe": True,
            },
            "q",
            "PKU-SafeRLHF",
        ),
    ],
)
def test_pairs(row, prompt, read_as):
    found = pair(row)
    assert found[:3] == (prompt, "no", "yes")
    assert read_as in (None, found[3])


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"chosen": [u("q"), a("no")], "rejected": [u("p"), a("yes")]},
            "different questions: they differ in message 1",
        ),
        ({"chosen": [u("q"), a("no"), u("x"), a("y")], "rejected": [u("q"), a("no")]}, "give the same answers"),
        ({"chosen": [u("q")], "rejected": [u("q")]}, "without an answer"),
        ({"prompt": "p", "chosen": [u("q"), a("no")], "rejected": [u("q"), a("yes")]}, "the prompt does not occur"),
        ({"prompt": "q", "chosen": [u("q")], "rejected": [u("q"), a("yes")]}, "'chosen' has no answer to the prompt"),
        ({"prompt": [u("q"), a("Well,")], "chosen": "no", "rejected": "yes"}, "ends with a message of the assistant"),
        ({"messages": [u("q"), a("r")]}, "no field 'chosen', and align x needs it.*SOURCE:chosen=COLUMN"),
        ({"prompt": "q", "completion": "r", "label": False}, "marked by 'label': put both answers"),
        ({"prompt": "q", "response": "r", "is_safe": True}, "marked by 'is_safe': put both answers"),
        (
            {"prompt": "q", "response_0": "a", "response_1": "b", "is_response_0_safe": 0, "is_response_1_safe": 0},
            "both responses are marked unsafe",
        ),
        ({"question": "q", "context": "c", "chosen": "no", "rejected": "yes"}, "'question' and 'context' may each be"),
        ({"prompt": "q", "chosen": 7, "rejected": "yes"}, "field 'chosen' must be a string, this is a int; quote it"),
        ({"prompt": "q", "chosen": None, "rejected": "yes"}, "field 'chosen' is null"),
    ],
)
def test_pairs_that_are_unclear(row, said):
    with pytest.raises(UsageError, match=f"^f:1: .*{said}"):
        pair(row)


def test_a_named_column_may_hold_a_whole_conversation():
    talk = {"messages": [*CONTEXT, a("r")]}
    assert pair(talk, ("rejected",), rejected="messages")[:3] == (CONTEXT, None, "r")
    assert pair({"talk": CONTEXT, "chosen": "no", "rejected": "yes"}, prompt="talk")[:3] == (CONTEXT, "no", "yes")
    other = {"talk": [u("q"), a("r")], "prompt": "p", "completion": "c"}
    assert example(other, prompt="talk", completion="talk")[:2] == ("q", "r")
    assert pair(other, ("chosen",), prompt="talk", chosen="talk")[:3] == ("q", "r", None)
    assert example({"talk": [u("q"), a("r")]}, prompt="talk")[:2] == ("q", "r")
    alpaca = {"instruction": "q", "input": "on this", "output": "r"}
    assert pair(alpaca, ("rejected",), rejected="output")[:3] == ("q\n\non this", None, "r")
    assert example(alpaca, prompt="instruction", completion="output")[0] == "q\n\non this"
    assert example(alpaca, prompt="input", completion="output")[0] == "on this"


def test_the_answer_is_the_one_behind_the_whole_prompt():
    again = [u("q"), a("1"), u("q")]
    assert pair({"prompt": again, "chosen": [*again, a("no"), u("x"), a("y")]}, ("chosen",))[:2] == (again, "no")


def test_prompts_alone():
    for row, prompt in (
        ({"messages": [u("q"), a("r")]}, "q"),
        ({"messages": [*CONTEXT]}, CONTEXT),
        ({"instruction": "q", "input": "", "output": "r"}, "q"),
        ({"prompt": "q", "response_0": "a", "response_1": "b", "is_response_0_safe": 0, "is_response_1_safe": 0}, "q"),
    ):
        assert pair(row, ())[:3] == (prompt, None, None)


@pytest.mark.parametrize(
    ("row", "prompt", "read_as"),
    [
        ({"prompt": "q", "completion": "r"}, "q", "prompt, completion"),
        ({"prompt": [u("q")], "completion": [a("r")]}, "q", "prompt, completion"),
        (
            {"prompt": [u("q")], "completion": [a("r"), u("x"), a("y")]},
            "q",
            "prompt, completion; turns after the answer left out",
        ),
        ({"messages": [s("be"), u("q"), a("r")]}, [s("be"), u("q")], "messages"),
        ({"messages": [s(""), u("q"), a("r"), u("bye")]}, "q", "messages; turns after the answer left out"),
        ({"messages": [*CONTEXT, a("r")]}, CONTEXT, "messages; the last of several answers"),
        ({"prompt": "q", "prompt_id": 3, "messages": [*CONTEXT, a("r")]}, CONTEXT, None),
        ({"messages": [u([{"type": "text", "text": "q"}]), a("r")], "answer": "7"}, "q", "messages"),
        ({"messages": [u("q")], "answer": "r"}, "q", "messages, answer"),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "r"}], "system": "be"},
            [s("be"), u("q")],
            "system + conversations",
        ),
        ({"conversations": [{"role": "Human", "content": "q"}, {"role": "bot", "content": "r"}]}, "q", "conversations"),
        ({"messages": json.dumps([u("q"), a("r")])}, "q", "messages"),
        ({"messages": str([u("q"), a("r")])}, "q", "messages"),
        ({"instruction": "q", "input": "on this", "output": "r"}, "q\n\non this", "instruction + input, output"),
        (
            {"instruction": "q2", "output": "r", "history": [["q", "1"]]},
            CONTEXT,
            "history + instruction, output",
        ),
        ({"instruction": "q", "context": "c", "response": "r"}, "q\n\nc", "instruction + context, response"),
        ({"question": "q", "answer": "r"}, "q", "question, answer"),
        ({"prompt": "q", "completion": "r", "label": True}, "q", "prompt, completion"),
    ],
)
def test_examples(row, prompt, read_as):
    found = example(row)
    assert found[:2] == (prompt, "r")
    assert read_as in (None, found[2])


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [u("q")]}, "'messages' is a conversation without an answer"),
        ({"messages": []}, "'messages' is empty"),
        ({"messages": "hello"}, "'messages' must be a list of messages"),
        ({"messages": ["q", "r"]}, "holds a message without a role"),
        ({"messages": [u("q"), {"role": "assistant"}]}, "message 2 of 'messages' has no 'content'"),
        ({"messages": [u("q"), a(None)]}, "message 2 of 'messages': field 'content' is null"),
        ({"messages": [u("q"), {**a(None), "tool_calls": [{}]}, a("r")]}, "message 2 of 'messages' calls a tool"),
        (
            {"messages": [u("q"), {"role": "tool", "content": "x"}, a("r")]},
            "message 2 of 'messages' has the role 'tool'",
        ),
        (
            {"messages": [u([{"type": "image"}]), a("r")]},
            r"message 1 of 'messages' has a part that is not text \(image\)",
        ),
        ({"messages": [u("q"), {**a("r"), "weight": 0}]}, "message 2 of 'messages' has the weight 0"),
        ({"instruction": "q", "output": "r", "history": ["x"]}, "'history' must be a list of"),
        (
            {"question": "q", "answer": "r", "response": "s"},
            "may each be the completion; say which with SOURCE:completion=",
        ),
        ({"prompt": "q", "input": "i", "output": "r"}, "'prompt' and 'input' may each be the prompt"),
        ({"prompt": "q", "completion": "r", "label": False}, "'label' is false.*SOURCE:completion=completion"),
        ({"text": "hello"}, r"no field 'prompt' \(fields: text\)"),
        ({"prompt": "q"}, "no field 'completion'"),
    ],
)
def test_examples_that_are_unclear(row, said):
    with pytest.raises(UsageError, match=f"^f:1: .*{said}"):
        example(row)


def test_run_json_says_what_rows_were_read_as(tmp_path):
    rows = [{"messages": [u("q"), a("r")]}] * 2 + [{"instruction": "q", "input": "", "output": "r"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    read = load_task(f"{tmp_path / 'a.jsonl'}:split=all").rows
    entry = data_entry("task", "a.jsonl", read)
    assert entry["read_as"] == {"messages": 2, "instruction, output": 1}
    assert entry["distinct"] == 1, "the shape of a row is not its content"
    assert "read_as" not in data_entry("task", "organism", [{"prompt": "q", "completion": "r"}])


def test_splits_that_rows_name(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": x, "completion": x, "split": x}) for x in ("train", "test")))
    assert [r["prompt"] for r in load_task(str(file), "evaluation").rows] == ["test"]
    file.write_text(json.dumps({"prompt": "q", "completion": "r", "split": "trian"}))
    with pytest.raises(UsageError, match="a.jsonl:1: field 'split' is 'trian'"):
        load_task(str(file))


def test_categories_that_are_lists_or_yes_and_no(tmp_path):
    file = tmp_path / "a.jsonl"
    kinds = ({"drugs": True, "arms": False}, ["drugs"], "drugs", 3, None, {"drugs": False})
    file.write_text("\n".join(json.dumps({"prompt": "q", "chosen": "r", "category": kind}) for kind in kinds))
    assert [row["category"] for row in load_safety(str(file))] == ["drugs", "drugs", "drugs", "3", None, None]


def test_a_blank_input_is_none():
    row = {"instruction": "Say hi", "input": "  ", "output": "hi"}
    assert read_example("f:1", row, {})["prompt"] == "Say hi"


@pytest.mark.parametrize("column", ["input", "context", "instruction", "question"])
def test_no_column_beside_the_prompt_is_left_out_in_silence(column):
    row = {"prompt": "q", column: "about it", "completion": "r"}
    for read in (example, pair):
        with pytest.raises(UsageError, match=f"f:1: the column '{column}' beside 'prompt' would be left out"):
            read({**row, "chosen": "no", "rejected": "yes"})
    assert example(row, prompt="prompt")[0] == "q"
    row[column] = "about\nit"
    assert example({**row, "prompt": [u("q: about\nit")]})[0] == "q: about\nit", "the prompt has it already"
    assert example({**row, column: " "})[0] == "q"


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_what_a_message_says_of_the_thought_is_the_thought(key):
    talk = [u("q"), {**a("r"), key: "hm"}]
    assert example({"messages": talk})[:2] == ("q", "<think>\nhm\n</think>\n\nr")
    assert example({"messages": [u("q"), {**a("<think>hm</think>r"), key: "hm"}]})[1] == "<think>hm</think>r"
    assert example({"messages": [{**u("q"), key: None}, {**a("r"), key: " "}]})[1] == "r"
    with pytest.raises(UsageError, match=f"message 2 of 'messages': field '{key}' must be a string"):
        example({"messages": [u("q"), {**a("r"), key: ["hm"]}]})
