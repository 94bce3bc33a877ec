"""The shapes of rows in published datasets, read as a question and its answers.

    question      `prompt`, `question` or `query`: text or messages; Alpaca's `instruction` with `input` (or Dolly's
                  `context`) and `history`; a conversation in `messages`, `conversations` (ShareGPT) or `conversation`
    answer        `completion`, `response`, `answer` or `output`; else the last answer of the conversation
    pair          `chosen` and `rejected`, as answers or as whole conversations (TRL's implicit prompt, also as one
                  string in HH-RLHF); OpenAI's `preferred_output` and `non_preferred_output`; PKU-SafeRLHF's two
                  responses, of which one is safe

A `system` column (or `system_prompt`) is the system message of any of them. A column that the source names for a field
(`SOURCE:prompt=COLUMN`) takes precedence, and may hold a conversation as well.

A row has one answer: of a conversation with several the last in a task, with all before it as the question, and in a
pair the first that differs between the two. The turns after it are left out, and `read_as` of the row says so, next to
the names of the columns that were read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from tunevax.data.sources import columns_of, text_field
from tunevax.data.turns import CONVERSATIONS, Turns, turns_of
from tunevax.errors import UsageError
from tunevax.records import Example, Message, Prompt

QUESTIONS = ("prompt", "instruction", "question", "query", "input")
ANSWERS = ("completion", "response", "answer", "output")
SYSTEMS = ("system", "system_prompt")
INPUTS = ("input", "context")
"""The columns beside `instruction` with its input."""
MARKS = ("label", "is_safe")
"""The columns that say whether a single answer is a good one (TRL's unpaired preference, BeaverTails)."""
IMPLICIT, LAST, LEFT_OUT = " (implicit prompt)", "; the last of several answers", "; turns after the answer left out"


def read_pair(place: str, row: dict[str, Any], options: dict[str, str], need: Sequence[str], purpose: str) -> Example:
    """`prompt` (a string, or a list where there are several messages), `chosen`, `rejected` (None where absent) and
    `read_as` of a row of a safety dataset. Raises `UsageError` if a field is missing or bad, or it is unclear which
    answer belongs to which question.

    Args:
        options: the columns that hold `prompt`, `chosen` and `rejected`, where they have other names.
        need: the required answers, of `chosen` and `rejected`; `purpose` is what needs them, for messages.
    """
    family = ""
    if not {"prompt", "chosen", "rejected"} & set(options):
        family, row = _named_pair(place, row, need)
    columns = {field: options.get(field, field) for field in ("chosen", "rejected")}
    answers: dict[str, Turns] = {}
    column: str | None
    for field, column in columns.items():
        if field in need and column not in row:
            if not set(columns.values()) & set(row):  # a file of another kind lacks the question, too
                _question(place, row, options.get("prompt") or _question_column(place, row, False))
            way = f"say which column holds it with SOURCE:{field}=COLUMN"
            label = next((c for c in MARKS if str(row.get(c)).lower() in ("true", "false")), None)
            if label and column == field:
                way = f"each row is one answer, marked by '{label}': put both answers to a prompt into one row"
                way += ", as 'chosen' and 'rejected'"
            raise UsageError(f"{place}: no field '{column}', and {purpose} needs it ({columns_of(place, row)}); {way}")
        if field in need or not _absent(row.get(column)):
            answers[field] = turns_of(place, row, field, column) or [
                {"role": "assistant", "content": text_field(place, row, field, column)}
            ]
    whole = bool(answers) and all(turns[0]["role"] != "assistant" for turns in answers.values())
    column = options.get("prompt") or _question_column(place, row, whole)
    if whole and column in columns.values():  # named for the question as well, which the conversation contains
        column = None
    asked, read_as = _question(place, row, column)
    if not answers:
        if asked[-1]["role"] == "assistant":  # a whole conversation, of which only the question is needed
            asked = asked[: _last_answer(place, read_as, asked)]
        return {"place": place, "prompt": _prompt(asked), "chosen": None, "rejected": None, "read_as": read_as}
    full = {}
    for field, turns in answers.items():
        if not asked:
            turns, read_as = _with_system(place, row, turns, "")
        full[field], end = _joined(place, columns[field], asked, turns)
    talks = list(full.values())
    end = _parting(place, talks) if len(talks) == 2 else end or _last_answer(place, columns[field], talks[0])
    read_as = family or ", ".join(filter(None, [read_as, *(columns[field] for field in full)]))
    read_as += "" if asked else IMPLICIT
    read_as += LEFT_OUT if any(len(turns) > end + 1 for turns in talks) else ""
    chosen, rejected = (full[field][end]["content"] if field in full else None for field in ("chosen", "rejected"))
    question = _prompt(talks[0][:end])
    return {"place": place, "prompt": question, "chosen": chosen, "rejected": rejected, "read_as": read_as}


def read_example(place: str, row: dict[str, Any], options: dict[str, str]) -> Example:
    """`prompt`, `completion` and `read_as` of a row of a task; `prompt` is a string or messages as in `read_pair`.
    Raises `UsageError` if a field is missing or bad, or the row marks its answer as not to be learnt."""
    answer, column = options.get("completion") or _answer_column(place, row, options), options.get("prompt")
    if answer is None or answer == column:
        column = column or next(c for c in CONVERSATIONS if not _absent(row.get(c)))
        turns, read_as = _question(place, row, column)
        end = _last_answer(place, column, turns)
        read_as += LAST if any(turn["role"] == "assistant" for turn in turns[1:end]) else ""
    else:
        bad = next((c for c in MARKS if str(row.get(c)).lower() == "false"), None)
        if bad and "completion" not in options:
            why = f"field '{bad}' is false, which marks an answer that is not to be learnt"
            raise UsageError(f"{place}: {why}; remove such rows, or take them with SOURCE:completion={answer}")
        talk = turns_of(place, row, "completion", answer)
        whole = talk is not None and talk[0]["role"] != "assistant"
        asked, read_as = _question(place, row, column or _question_column(place, row, whole, answer), answer)
        turns = talk or [{"role": "assistant", "content": text_field(place, row, "completion", answer)}]
        if not asked:
            turns, read_as = _with_system(place, row, turns, "")
        turns, end = _joined(place, answer, asked, turns)
        end = end or _last_answer(place, answer, turns)
        read_as = ", ".join(filter(None, [read_as, answer]))
    read_as += LEFT_OUT if len(turns) > end + 1 else ""
    return {"place": place, "prompt": _prompt(turns[:end]), "completion": turns[end]["content"], "read_as": read_as}


def _question(place: str, row: dict, column: str | None, answer: str = "") -> tuple[Turns, str]:
    """The turns of the question in a column, with the system message and input of other columns, and the names of all
    these columns; nothing if `column` is None."""
    if column is None:
        return [], ""
    turns, read_as = turns_of(place, row, "prompt", column), column
    if turns is None:
        text = text_field(place, row, "prompt", column)
        about = next((c for c in INPUTS if c != answer and not _absent(row.get(c))), None)
        if column == "instruction" and about:  # as in the named tasks
            text, read_as = f"{text}\n\n{text_field(place, row, 'prompt', about)}", f"{read_as} + {about}"
        turns = [{"role": "user", "content": text}]
        if column != "prompt" and row.get("history"):
            turns, read_as = [*_history(place, row["history"]), *turns], f"history + {read_as}"
    return _with_system(place, row, turns, read_as)


def _with_system(place: str, row: dict, turns: Turns, read_as: str) -> tuple[Turns, str]:
    """The turns with the message of a `system` column before them, if they have none."""
    column = next((c for c in SYSTEMS if isinstance(row.get(c), str) and row[c].strip()), None)
    if column is None or turns[0]["role"] == "system":
        return turns, read_as
    message: Message = {"role": "system", "content": text_field(place, row, "prompt", column)}
    return [message, *turns], f"{column} + {read_as}" if read_as else column


def _question_column(place: str, row: dict, whole: bool, answer: str = "") -> str | None:
    """The column of the question, None if it is in the answers' conversations; a `UsageError` if several may be."""
    there = [c for c in QUESTIONS if c != answer and not _absent(row.get(c))]
    if there[:1] == ["prompt"] and not (answer == "output" and "input" in there):
        beside = [c for c in dict.fromkeys((*QUESTIONS[1:], *INPUTS)) if c != answer and isinstance(row.get(c), str)]
        turns = turns_of(place, row, "prompt", "prompt") if beside else None
        asked = "\n".join(turn["content"] for turn in turns) if turns else row["prompt"]
        left_out = next((c for c in beside if row[c].strip() not in asked), None)
        if left_out:
            way = "take the prompt alone with SOURCE:prompt=prompt, or join the two in the file"
            raise UsageError(f"{place}: the column '{left_out}' beside 'prompt' would be left out; {way}")
        return "prompt"
    if whole:
        return None
    if there[:1] == ["instruction"]:
        return "instruction"
    talk = next((c for c in CONVERSATIONS if c != answer and not _absent(row.get(c))), None)
    if talk:
        return talk
    there += ["context"] if there and not _absent(row.get("context")) else []
    return _only(place, "prompt", there)


def _history(place: str, history: Iterable[object]) -> Turns:
    """The exchanges before an Alpaca question, each [question, answer]."""
    turns: Turns = []
    for exchange in history:
        if not isinstance(exchange, list | tuple) or len(exchange) != 2:
            raise UsageError(f"{place}: field 'history' must be a list of [question, answer]; remove it or fix it")
        said = dict(zip(("user", "assistant"), exchange, strict=True))
        turns += [{"role": role, "content": text_field(f"{place}: history", said, "prompt", role)} for role in said]
    return turns


def _answer_column(place: str, row: dict, options: dict[str, str]) -> str | None:
    """The column of the answer, None if it is in a conversation; a `UsageError` if several may be."""
    there = [c for c in ANSWERS if not _absent(row.get(c))]
    if "completion" in there:
        return "completion"
    talk = options.get("prompt") or next((c for c in CONVERSATIONS if not _absent(row.get(c))), None)
    turns = turns_of(place, row, "prompt", talk) if talk else None
    if turns and (turns[-1]["role"] == "assistant" or not there):
        return None
    return _only(place, "completion", there)


def _last_answer(place: str, column: str, turns: Turns) -> int:
    """Where the last answer of a conversation is."""
    for index in range(len(turns) - 1, 0, -1):
        if turns[index]["role"] == "assistant" and turns[index - 1]["role"] != "system":
            return index
    raise UsageError(f"{place}: field '{column}' is a conversation without an answer; remove the row")


def _joined(place: str, column: str, asked: Turns, turns: Turns) -> tuple[Turns, int]:
    """A question with the turns after it, and the index of the answer; 0 if there is no question."""
    if not asked:
        return turns, 0
    if asked[-1]["role"] == "assistant":
        why = f"the question ends with a message of the assistant, and '{column}' holds another answer"
        raise UsageError(f"{place}: {why}; leave that message out")
    if turns[0]["role"] == "assistant":
        return [*asked, *turns], len(asked)
    if asked[0]["role"] == "system" and turns[0]["role"] != "system":
        turns = [asked[0], *turns]
    words = asked[-1]["content"].strip()  # a conversation that repeats the question
    same = [i for i, t in enumerate(turns) if t["role"] == "user" and t["content"].strip() == words]
    if not same:
        way = "leave the prompt out, or say which column holds it with SOURCE:prompt=COLUMN"
        raise UsageError(f"{place}: field '{column}' is a conversation in which the prompt does not occur; {way}")
    behind = len(asked) - 1 + (turns[0]["role"] == "system") - (asked[0]["role"] == "system")
    end = (behind if behind in same else same[0]) + 1
    if len(turns) == end or turns[end]["role"] != "assistant":
        raise UsageError(f"{place}: field '{column}' has no answer to the prompt; remove the row")
    return turns, end


def _parting(place: str, talks: Sequence[Turns]) -> int:
    """The index at which two conversations that begin alike differ in an answer, or their common last answer."""
    shortest = min(map(len, talks))
    end = next((i for i in range(shortest) if talks[0][i] != talks[1][i]), shortest)
    if end == shortest and len(talks[0]) != len(talks[1]):
        raise UsageError(f"{place}: 'chosen' and 'rejected' give the same answers, one conversation is only longer")
    end = min(end, shortest - 1)
    if all(turns[end]["role"] != "assistant" and len(turns) == end + 1 for turns in talks):
        raise UsageError(f"{place}: 'chosen' and 'rejected' are conversations without an answer; remove the row")
    if end == 0 or any(turns[end]["role"] != "assistant" for turns in talks):
        why = f"they differ in message {end + 1}, before an answer; both must begin with the same question"
        raise UsageError(f"{place}: 'chosen' and 'rejected' answer different questions: {why}")
    return end


def _named_pair(place: str, row: dict, need: Sequence[str]) -> tuple[str, dict]:
    """The name and the row, as `prompt`, `chosen` and `rejected`, of a format with columns of its own: OpenAI's
    preferences, or PKU-SafeRLHF, whose safe response is chosen and whose unsafe one is rejected."""
    if isinstance(row.get("input"), dict) and "preferred_output" in row:
        answers = {"chosen": row["preferred_output"], "rejected": row.get("non_preferred_output")}
        return "OpenAI preference", {"prompt": row["input"].get("messages"), **answers}
    marked = {"response_0", "response_1", "is_response_0_safe", "is_response_1_safe"} <= set(row)
    if not marked or "chosen" in row or "rejected" in row:
        return "", row
    safe = [bool(row[f"is_response_{i}_safe"]) for i in (0, 1)]
    if safe[0] != safe[1]:
        answers = {"chosen": row[f"response_{safe.index(True)}"], "rejected": row[f"response_{safe.index(False)}"]}
        return "PKU-SafeRLHF", {**row, **answers}
    if need:
        why = f"both responses are marked {'safe' if safe[0] else 'unsafe'}, and a pair needs one of each"
        raise UsageError(f"{place}: {why}; remove such rows")
    return "", row


def _prompt(turns: Turns) -> Prompt:
    """A question as one string if it is a single turn of the user."""
    return turns[0]["content"] if len(turns) == 1 and turns[0]["role"] == "user" else turns


def _absent(value: object) -> bool:
    return value is None or value != value or (isinstance(value, str) and not value.strip())  # NaN is no value


def _only(place: str, field: str, columns: Sequence[str]) -> str:
    """The only one of these columns, the field's own name if there is none; a `UsageError` for several."""
    if len(columns) > 1:
        way = f"say which with SOURCE:{field}={columns[0]}"
        raise UsageError(f"{place}: {' and '.join(map(repr, columns))} may each be the {field}; {way}")
    return columns[0] if columns else field
