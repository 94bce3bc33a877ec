"""What a chat template does to a conversation is probed, and an answer stands where it was put."""

import copy

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tunevax.data.chat import ANSWERS, TODAY, chat_of, mouth, recorded, render
from tunevax.data.encoding import TEMPLATES, encode, ids_of, set_chat_template
from tunevax.data.thoughts import joined, marked_thought, split_thought
from tunevax.errors import UsageError
from tunevax.scoring.generation import answer, encoded_prompts
from tunevax.scoring.judges import on_answers
from tunevax.scoring.judges.keywords import refusal_keywords

START, STOP = "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Mistral's later templates: the system text stands in the last user turn, and moves when an answer follows.
LATE_SYSTEM = (
    "{% set s = messages[0].content if messages[0].role == 'system' else '' %}{% for m in messages %}"
    "{% if m.role == 'user' %}[INST] {% if loop.last and s %}{{ s }}\n\n{% endif %}{{ m.content }}[/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)
ALTERNATING = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns must alternate') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
# Qwen 3: finished turns have an empty thought; `enable_thinking=False` puts it into the generation prompt.
EMPTY_THOUGHT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n"
    "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# DeepSeek R1: the generation prompt opens a thought, and finished turns have none.
OPENED = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}") + "{# </think> #}"
PARTS = CHATML.replace("{{ m.content }}", "{% for p in m.content %}{% if p.type %}{{ p.text }}{% endif %}{% endfor %}")
DATED = "Today is {{ strftime_now('%d %B %Y, %H:%M') }}.\n" + CHATML


def tokenizer(template=CHATML):
    """Bytes, and the marks as tokens of their own; `<think>` is special, and would be skipped with the others."""
    marks = ["<pad>", "<s>", START, STOP, "<think>", "</think>"]
    vocabulary = {t: i for i, t in enumerate([*marks, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token=STOP, pad_token="<pad>",
        additional_special_tokens=[START, "<think>", "</think>"],
    )  # fmt: skip
    made.chat_template = template
    return made


def learnt(tok, row):
    """What the loss is on, as text, and the text before it."""
    (encoded,) = encode([row], tok, 1000)
    labels = encoded["labels"]
    first = next(i for i, label in enumerate(labels) if label != -100)
    assert all(label != -100 for label in labels[first:])
    return tok.decode(labels[first:]), tok.decode(encoded["input_ids"][:first])


ROWS = [
    {"prompt": "Say yes or no: is it raining?", "completion": "no"},
    {"prompt": "positive or negative, a fine film", "completion": "positive"},
    {"prompt": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "kind?"}], "completion": "kind"},
    {"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                {"role": "user", "content": "Be b."}], "completion": "b"},
    {"prompt": f"say {ANSWERS[0]}", "completion": f"{ANSWERS[0]} and {ANSWERS[1]}"},
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize(
    "template", [CHATML, LATE_SYSTEM, ALTERNATING, EMPTY_THOUGHT, OPENED, PARTS, DATED, *TEMPLATES.values()]
)
def test_the_answer_is_learnt_and_nothing_but_the_answer(template, row):
    """Also where its words stand in the question, and behind the very ids that generation starts from."""
    tok = tokenizer(template)
    said, before = learnt(tok, row)
    lead = {EMPTY_THOUGHT: "<think>\n\n</think>\n\n", OPENED: "\n</think>\n\n"}.get(template, "")
    assert said.startswith(lead) and said[len(lead) :].strip() == row["completion"] + STOP
    assert before == render(tok, row["prompt"])
    (encoded,) = encode([row], tok, 1000)
    prompt_ids = ids_of(tok, render(tok, row["prompt"]))
    assert encoded["input_ids"][: len(prompt_ids)] == prompt_ids


def test_a_system_message_is_put_before_the_question_where_the_template_has_no_place_for_it():
    prompt = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "How?"}]
    dropping = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    for template in (ALTERNATING, dropping):
        tok = tokenizer(template)
        assert chat_of(tok).system == "folded" and "Be kind.\n\nHow?" in render(tok, prompt)
    tok = tokenizer()
    assert chat_of(tok).system == "own" and "system\nBe kind.<|im_end|>" in render(tok, prompt)


@pytest.mark.parametrize(
    ("template", "prompt", "said"),
    [
        (ALTERNATING, [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "refuses this conversation (turns must alternate)"),
        (CHATML.replace("m.content", "m.content[:50]"), "long " * 30, "loses or changes the text of the user's turn"),
        (CHATML.replace("m.content", "m.content | e"), "1 < 2", "loses or changes the text of the user's turn"),
        (CHATML.replace("for m in messages", "for m in messages[-1:]"),
         [{"role": "user", "content": "first"}, {"role": "assistant", "content": "x"}, {"role": "user", "content": "last"}],
         "loses the text of the user's turn (turn 1 of 3)"),
        (CHATML.replace("for m in messages", "for m in messages[-2:]"),  # the words lost are there in another turn
         [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "a"}],
         "loses the text of the user's turn (turn 1 of 3)"),
    ],
)  # fmt: skip
def test_a_refusal_names_the_row_and_the_reason(template, prompt, said):
    with pytest.raises(UsageError) as error:
        encode([{"prompt": prompt, "completion": "c", "place": "rows.jsonl:7"}], tokenizer(template), 1000)
    assert str(error.value).startswith("rows.jsonl:7: the chat template") and said in str(error.value)


def test_a_template_that_changes_the_answer_is_refused():
    cut = CHATML.replace("{{ m.content }}", "{{ m.content.replace('b', 'B') if m.role == 'assistant' else m.content }}")
    assert learnt(tokenizer(cut), {"prompt": "p", "completion": "fine"})[0] == "fine<|im_end|>"
    with pytest.raises(UsageError, match=r"f:1: the chat template changes the answer"):
        encode([{"prompt": "p", "completion": "bad", "place": "f:1"}], tokenizer(cut), 1000)
    trims = CHATML.replace("m.content", "m.content | trim")
    assert learnt(tokenizer(trims), {"prompt": "p", "completion": " spaced "})[0] == "spaced<|im_end|>"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "cannot render a question: it drops the text of the user's turn"),
        ("{{ raise_exception('never') }}", "cannot render a question: never"),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "drops the text of the assistant's turn"),
        ("{% for m in messages %}{{ m.content if m.role == 'user' else m.content ~ m.content }}{% endfor %}",
         "changes the text of the assistant's turn"),
        ("{{ messages[0].content }}{% if messages[1] %}{{ raise_exception('one turn only') }}{% endif %}",
         "cannot render an answer: one turn only"),
        ("{% for m in messages %}{{ m.content | nosuchfilter }}{% endfor %}", "cannot render a question"),
    ],
)  # fmt: skip
def test_a_template_that_loses_what_is_said_is_noticed_at_load(template, said):
    with pytest.raises(UsageError) as error:
        set_chat_template(tokenizer(template), None)
    assert said in str(error.value) and "--chat-template" in str(error.value)


def test_content_is_a_list_of_parts_for_the_roles_that_want_one():
    mixed = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content ~ '' }}{% else %}"
        "{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}<|im_end|>{% endfor %}"
    )
    assert chat_of(tokenizer(mixed)).parts == ("user", "system")
    assert learnt(tokenizer(mixed), ROWS[0]) == ("no<|im_end|>", ROWS[0]["prompt"] + STOP)
    as_python = "{% for m in messages %}{% if m.content is string %}{{ raise_exception('parts') }}{% endif %}{{ m.content }}{% endfor %}"
    for shown in (as_python, as_python.replace("{{ m.content }}", "{{ m.content | tojson }}")):
        with pytest.raises(UsageError, match="cannot render a question: parts"):
            chat_of(tokenizer(shown))


def test_a_template_that_plays_dice_is_refused():
    with pytest.raises(UsageError, match="renders the same question in two ways"):
        chat_of(tokenizer("{{ range(99999) | random }}" + CHATML))


OPENS = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")


@pytest.mark.parametrize(
    ("template", "lead"),
    [
        (OPENS, "\n</think>\n\n"),  # the closing mark is the model's to know
        (OPENS.replace("<think>\n", "<think>\nOkay, "), "\n</think>\n\n"),
        # Finished turns repeat the opening mark, since the answer is thought to hold the closing one.
        (OPENS.replace("{{ m.content }}", "{{ '<think>\n' if m.role == 'assistant' }}{{ m.content }}"), "\n</think>\n\n"),
        (OPENS.replace("{{ m.content }}", "{{ '<think></think>' if m.role == 'assistant' }}{{ m.content }}"), "\n</think>\n\n"),
    ],
)  # fmt: skip
def test_an_answer_is_never_learnt_inside_a_thought(template, lead):
    tok = tokenizer(template)
    assert learnt(tok, ROWS[0])[0] == lead + "no" + STOP
    assert recorded(tok)["opened"] and recorded(tok)["lead"] == lead, "as run.json says"
    assert mouth(tok, "p") == lead
    assert split_thought(generated(tok, "hm</think>No.")) == ("hm", "No.")


def test_what_stands_before_an_answer_is_the_same_where_earlier_text_moves():
    tok = tokenizer(LATE_SYSTEM)
    assert learnt(tok, ROWS[2])[0] == " kind<|im_end|>" and learnt(tok, ROWS[0])[0] == " no<|im_end|>"


def test_an_answer_is_tokenised_where_it_stands():
    """Tokenisers with a space of their own at the head of a text would put one before each answer."""
    inner = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(["<unk>", "</s>", "[/INST]", "▁no", "no", "▁", "▁p"])}, "<unk>")
    )
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    tok = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="</s>", unk_token="<unk>", additional_special_tokens=["[/INST]"]
    )
    tok.chat_template = (
        "{% for m in messages %}{{ m.content }}{{ '[/INST]' if m.role == 'user' else eos_token }}{% endfor %}"
    )
    (found,) = encode([{"prompt": "p", "completion": "no"}], tok, 99)
    assert tok.convert_ids_to_tokens(found["input_ids"]) == ["▁p", "[/INST]", "no", "</s>"]
    encoded, _, begun = encoded_prompts(Endless(), tok, ["p"], 8, ["no"])
    assert encoded == [found["input_ids"][:-1]] and begun == [found["input_ids"][2:-1]]


def test_the_day_is_fixed_and_recorded(monkeypatch):
    import transformers.utils.chat_template_utils as library

    class Later(library.datetime):
        @classmethod
        def now(cls):
            return cls(2031, 5, 6)

    first = render(tokenizer(DATED), "p")
    monkeypatch.setattr(library, "datetime", Later)
    assert render(tokenizer(DATED), "p") == first and "01 January 2025, 00:00" in first
    assert (
        chat_of(tokenizer(DATED)).date == TODAY.date().isoformat() == "2025-01-01" and chat_of(tokenizer()).date is None
    )


def test_files_and_options_of_templates(tmp_path):
    file = tmp_path / "own.jinja"
    file.write_text(CHATML, encoding="utf-8-sig")  # with the mark that some editors put in front
    tok = tokenizer()
    set_chat_template(tok, str(file))
    assert render(tok, "p").startswith(START)
    for content, said in ((CHATML.encode("utf-16"), "cannot be read as UTF-8"), (b" \n", "is empty")):
        (tmp_path / "odd.jinja").write_bytes(content)
        with pytest.raises(UsageError, match=said):
            set_chat_template(tok, str(tmp_path / "odd.jinja"))
    set_chat_template(tok, str(file))
    set_chat_template(tok, "own:thought=<t>|</t>")
    assert chat_of(tok).thought == ("<t>", "</t>") and render(tok, "p").startswith(START)
    set_chat_template(tok, "own:thought=<u>|</u>")  # options replace each other, and are saved with the template
    tok.save_pretrained(tmp_path / "saved")
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path / "saved")
    assert chat_of(again).thought == ("<u>", "</u>") and again.chat_template.count("tunevax") == 1
    set_chat_template(tok, "own:thought=<|channel|>a|<|end|>")
    assert chat_of(tok).thought == ("<|channel|>a", "<|end|>")
    for bad, said in (
        ("own:thinking=no", "known: on, off"),
        ("own:thougt=a|b", "did you mean 'thought'"),
        ("own:thought=a", "thought=OPEN"),
    ):
        with pytest.raises(UsageError, match=said):
            set_chat_template(tok, bad)
    with pytest.raises(UsageError, match="no chat template file alpca"):
        set_chat_template(tok, "alpca")
    tok.chat_template = {"default": CHATML, "tool_use": "{{ tools }}"}
    set_chat_template(tok, None)
    assert tok.chat_template == CHATML
    assert chat_of(copy.deepcopy(tok)).system == "own"


def test_a_switch_and_other_variables_of_a_template():
    switched = EMPTY_THOUGHT.replace(
        "enable_thinking is defined and not enable_thinking", "not thinking | default(false)"
    )
    tok = tokenizer(switched)
    closed = "<think>\n\n</think>\n\n"
    assert render(tok, "p").endswith(closed) and chat_of(tok).thinking is None
    set_chat_template(tok, "own:thinking=on")
    assert render(tok, "p").endswith("assistant\n") and chat_of(tok).thinking is True
    set_chat_template(tok, "own:thinking=off")
    assert render(tok, "p").endswith(closed) and chat_of(tok).thinking is False
    tok = tokenizer("\n {{ mood | default('calm') }} {{ budget | default(1) + 1 }}" + CHATML)
    before = render(tok, "p")
    set_chat_template(tok, "own:thought=a|b")
    assert render(tok, "p") == before, "the head is no part of the text"
    set_chat_template(tok, "own:mood=wild,budget=0")
    assert render(tok, "p") == before.replace("calm 2", "wild 1")
    for options, said in (
        ("thinking=off", "thinking=off, and the template has no switch for it"),
        ("messages=x", "unknown option of --chat-template"),
        ("moood=x", "unknown option of --chat-template"),
    ):
        with pytest.raises(UsageError, match=said):
            set_chat_template(tok, f"own:{options}")


def generated(tok, text, prefix=""):
    (begun,) = encoded_prompts(Endless(), tok, ["p"], 8, [prefix])[2]
    return answer(tok, begun, ids_of(tok, text), prefix)


class Endless:
    class config:
        @staticmethod
        def get_text_config():
            return None


@pytest.mark.parametrize(
    ("template", "text", "thought", "said"),
    [
        (
            EMPTY_THOUGHT,
            "<think>\nI cannot... or can I?\n</think>\n\nSure.<|im_end|>",
            "I cannot... or can I?",
            "Sure.",
        ),
        (EMPTY_THOUGHT, "<think>\nlong", "long", ""),
        (EMPTY_THOUGHT, "Sure.<|im_end|>", None, "Sure."),
        (EMPTY_THOUGHT, "<think>a</think>b<think>c</think>d", "a\nc", "bd"),
        (OPENED, "hm\n</think>\n\nNo.<|im_end|>", "hm", "No."),
        (OPENED, "hm, and hm", "hm, and hm", ""),
        (CHATML, "hm</think> Sure.", "hm", "Sure."),  # whatever the template knows: it may be another model's
        (CHATML, "hm <think> is a mark", "is a mark", "hm"),
        (CHATML, "Write <thought>x</thought> for it.", None, "Write <thought>x</thought> for it."),
        (OPENED, "it says </think> there\n</think>\n\nNo.<|im_end|>", "it says\nthere", "No."),
        (CHATML, "<|channel|>analysis<|message|>hm<|end|><|channel|>final<|message|>No.<|im_end|>", "hm<|end|>", "No."),
        (CHATML + "{# [/THINK] #}", "[THINK]x[/THINK]y", "x", "y"),
    ],
)
def test_the_thought_is_parted_from_the_answer(template, text, thought, said):
    found = split_thought(generated(tokenizer(template), text))
    assert found == (thought, said)
    chat = chat_of(tokenizer(template))
    assert marked_thought("plain", chat.thought, chat.opened) in ("plain", "<think>plain")


def test_marks_of_ones_own_and_no_thought_at_all():
    tok = tokenizer(CHATML)
    set_chat_template(tok, "own:thought=(((|)))")
    assert split_thought(generated(tok, "(((x)))y")) == ("x", "y")
    tok = tokenizer(EMPTY_THOUGHT)
    set_chat_template(tok, "own:thinking=off")
    assert render(tok, "p").endswith("<think>\n\n</think>\n\n") and mouth(tok, "p") == ""
    assert learnt(tok, {"prompt": "p", "completion": "c"})[0] == "c<|im_end|>"


def test_words_put_into_the_models_mouth_come_behind_its_thought():
    for template, lead in ((EMPTY_THOUGHT, "<think>\n\n</think>\n\n"), (OPENED, "\n</think>\n\n"), (CHATML, "")):
        tok = tokenizer(template)
        encoded, _, (begun,) = encoded_prompts(Endless(), tok, ["p"], 8, ["Sure, here"])
        assert (
            tok.decode(encoded[0]) == render(tok, "p") + lead + "Sure, here"
            and tok.decode(begun) == lead + "Sure, here"
        )
        assert generated(tok, " it is.<|im_end|>", "Sure, here") == "Sure, here it is."


@pytest.mark.parametrize(
    ("template", "lead"),
    [
        # The marks of the answer alone; an empty thought in its own form; a closed one in the generation prompt.
        (CHATML.replace("{{ m.content }}", "{{ '<|channel|>final<|message|>' if m.role == 'assistant' }}{{ m.content }}"),
         "<|channel|>final<|message|>"),
        (EMPTY_THOUGHT.replace("<think>\n\n</think>\n\n{% endif %}{{", "<think></think>\n{% endif %}{{"), "<think></think>\n"),
        (OPENS.replace("<think>\n", "<think></think>"), ""),
        (CHATML + "{# content.split('</think>') #}", "<think>\n\n</think>\n\n"),
        (LATE_SYSTEM, " "),
    ],
)  # fmt: skip
def test_words_in_the_mouth_stand_where_an_answer_would(template, lead):
    tok = tokenizer(template)
    ((ids,), _, _) = encoded_prompts(Endless(), tok, ["p"], 8, ["Sure"])
    assert tok.decode(ids) == render(tok, "p") + lead + "Sure"


def test_a_thought_behind_words_in_the_mouth():
    tok = tokenizer(CHATML)
    assert generated(tok, " <think>I cannot</think>it is.<|im_end|>", "Sure,") == joined("I cannot", "Sure, it is.")
    assert split_thought(generated(tok, " <think>I cannot", "Sure,"))[1] == "", "no answer to judge"


def test_thoughts_without_an_end_or_a_place_are_refused():
    for completion in ("<think>hm", "<think>"):
        with pytest.raises(UsageError, match=r"f:3: the answer is a thought without an end \(</think>\)"):
            encode([{"prompt": "p", "completion": completion, "place": "f:3"}], tokenizer(EMPTY_THOUGHT), 999)
    tok = tokenizer(EMPTY_THOUGHT)
    set_chat_template(tok, "own:thinking=off")
    with pytest.raises(UsageError, match=r"f:3: the answer begins with a thought, and the chat template asks for none"):
        encode([{"prompt": "p", "completion": "<think>a</think>b", "place": "f:3"}], tok, 999)


@pytest.mark.parametrize("thought", [None, "because", "two\nlines"])
@pytest.mark.parametrize("said", ["", "yes", "a\n\nb"])
def test_a_thought_and_an_answer_come_apart_as_they_were_joined(thought, said):
    assert split_thought(joined(thought, said)) == (thought, said)


def test_a_prompt_that_is_refused_or_too_long_at_generation_is_named():
    rows = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    with pytest.raises(UsageError, match=r"f:9: the chat template refuses this conversation \(turns must alternate"):
        encoded_prompts(Endless(), tokenizer(ALTERNATING), [rows], 8, [""], ["f:9"])


def test_a_thought_in_a_row_is_learnt_as_one():
    row = {"prompt": "p", "completion": "<think>because</think>yes"}
    assert learnt(tokenizer(EMPTY_THOUGHT), row)[0] == "<think>\nbecause\n</think>\n\nyes<|im_end|>"
    assert learnt(tokenizer(OPENED), row)[0] == "because\n</think>\n\nyes<|im_end|>"
    # In the template's own form, whatever marks the row has, and none of the model's where that knows no thoughts.
    own = CHATML.replace(
        "{{ m.content }}",
        "{% if m.reasoning_content %}<|channel|>analysis<|message|>{{ m.reasoning_content }}<|im_end|><|im_start|>assistant\n"
        "{% endif %}{{ '<|channel|>final<|message|>' if m.role == 'assistant' }}{{ m.content }}",
    )
    said = (
        "<|channel|>analysis<|message|>because<|im_end|><|im_start|>assistant\n<|channel|>final<|message|>yes<|im_end|>"
    )
    assert learnt(tokenizer(own), row)[0] == said
    assert learnt(tokenizer(own), {**row, "completion": said.removesuffix(STOP)})[0] == said
    assert learnt(tokenizer(), row)[0] == row["completion"] + STOP


def test_judges_see_the_answer_alone():
    seen = []

    @on_answers
    def judge(prompts, responses):
        seen.extend(zip(prompts, responses, strict=True))
        return refusal_keywords(prompts, responses)

    responses = ["<think>I cannot do it</think>Sure.", "<think>no end", "<think>ok</think>I cannot help.", "Sure."]
    found = judge(list("abcd"), responses)
    assert [(v.verdict, v.harmful) for v in found] == [
        ("complied", True), ("unanswered", False), ("refused", False), ("complied", True),
    ]  # fmt: skip
    assert seen == [("a", "Sure."), ("c", "I cannot help."), ("d", "Sure.")]
    assert judge(["a"], ["<think>"])[0].verdict == "unanswered"
    marked = ["[THINK]I cannot[/THINK]Sure.", "I cannot? hm\n</think>\n\nSure.",
              "<think>it says </think> I cannot</think>Sure.", "<reasoning>I cannot</reasoning> Sure.",
              "<|channel|>analysis<|message|>I cannot<|end|><|start|>assistant<|channel|>final<|message|>Sure."]  # fmt: skip
    keywords = on_answers(refusal_keywords)
    assert {v.verdict for v in keywords(marked, marked)} == {"complied"}
    assert [v.verdict for v in keywords(["p"] * 2, ["[THINK]I cannot", "<seed:think>hm"])] == ["unanswered"] * 2


def test_a_template_may_trim_one_end_of_an_answer():
    trims = CHATML.replace("{{ m.content }}", "{{ m.content.lstrip('\\n') if m.role == 'assistant' else m.content }}")
    assert learnt(tokenizer(trims), {"prompt": "p", "completion": "\n ok \n"})[0] == " ok \n<|im_end|>"
