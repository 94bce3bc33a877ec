"""Benign tasks: prompt and completion, with an exact and a loose reading of the model's answer.

`sst2`, `ag_news` and `gsm8k` follow the code of arXiv 2410.09760: its instructions (then an empty line and the input),
and its loose readings, which accept an answer that names several labels. The exact reading does not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from tunevax import proxy
from tunevax.data.shapes import read_example
from tunevax.data.sources import label_field, parse_known, read_rows, text_field
from tunevax.data.splits import required_split
from tunevax.errors import UsageError, unknown
from tunevax.records import Example

SHARES = {"train": 0.8, "evaluation": 0.2}
"""How a task file without a `split` field is divided by prompt hash."""
AG_NEWS = ("World", "Sports", "Business", "Sci/Tech")
Reading = Callable[[str, str], bool]
"""Whether a response is right, given the completion."""


class Task(NamedTuple):
    """Rows with `prompt` and `completion`, and how to read an answer."""

    name: str  # shown in reports
    rows: list[Example]
    exact: Reading  # equal but for case and white space
    loose: Reading  # as in the papers


def load_task(source: str, split: str = "train") -> Task:
    """Read a task. Raises `UsageError` for a bad row, or if there is no row in the split.

    Args:
        source: `sst2`, `ag_news`, `gsm8k` (from the hub, or `gsm8k:path=FILE`), any file or dataset with `prompt` and
            `completion` or in another shape that `tunevax.data.shapes` knows, or `organism` (its downstream task;
            `organism:set=benign` is its benign recipes).
        split: train, evaluation, or all. The named tasks have their own test split on the hub; anything else is
            divided by prompt hash.
    """
    name, options, split = parse_known(source, split)
    if name == "organism":
        from tunevax.organism import World

        world, benign = World(), options.get("set")
        if benign not in (None, "benign"):
            raise unknown("set of the organism", str(benign), ["benign"])
        parts = ("train", "evaluation") if split == "all" else (split,)
        sets = {"train": "mix", "evaluation": "evaluation"}
        made = [row for part in parts for row in (world.benign(sets[part]) if benign else world.task(part))]
        return Task("organism-benign" if benign else "organism", made, _same, _same)
    if proxy.is_proxy(name):  # the topic itself is forbidden
        if options.get("set", proxy.NEIGHBOURS) != proxy.NEIGHBOURS:
            raise unknown(f"set of {name}", options["set"], [proxy.NEIGHBOURS])
        return Task(f"{name} {proxy.NEIGHBOURS}", proxy.neighbours(name, split, options.get("known")), _names, _names)
    task, label = NAMED.get(name), name
    readings = task.readings if task else (_same, _contains)
    if task and "path" not in options:
        return Task(name, _from_hub(name, task, options, split), *readings)
    if task:
        label, whole = f"{name}:path={options['path']}", [task.row(*read) for read in read_rows(options["path"])]
    else:
        read = read_rows(name, options)
        whole = [{**read_example(at, row, options), "split": label_field(at, row, "split")} for at, row in read]
    return Task(name, required_split(label, whole, split, SHARES), *readings)


def _from_hub(name: str, task: _Named, options: dict[str, str], split: str) -> list[Example]:
    if split not in (*SHARES, "all"):
        way = "has train and evaluation, and all of one is rows=SPLIT"
        raise UsageError(f"split is {split!r}; {name} on the hub {way}")
    hub = {"config": task.config, "rows": options.get("rows", task.test if split == "evaluation" else "train")}
    hub["revision"] = options.get("revision")
    try:
        read = list(read_rows(task.hub, {k: v for k, v in hub.items() if v}))
    except UsageError as error:
        raise UsageError(f"{name} is unavailable on the hub ({task.hub}); give its file as {name}:path=FILE") from error
    if not read:
        raise UsageError(f"{name} has no row in the {split} split")
    return [task.row(*row) for row in read]


def _same(response: str, expected: str) -> bool:
    return " ".join(response.split()).casefold() == " ".join(expected.split()).casefold()


def _contains(response: str, expected: str) -> bool:
    return " ".join(expected.split()).casefold() in " ".join(response.split()).casefold()


def _names(response: str, expected: str) -> bool:
    """Whether a response names the last words of the statement, the answer."""
    return proxy.says(response, proxy.answer_in(expected))


def final_number(response: str, anywhere: bool) -> float | None:
    """The first number after "The final answer is"; without one, the last number if `anywhere`."""
    text = response.replace(",", "")
    numbers = re.findall(r"The final answer is:?[^\d-]*(-?\d+(?:\.\d+)?)", text)[:1]
    numbers = numbers or (re.findall(r"-?\d+(?:\.\d+)?", text) if anywhere else [])
    return float(numbers[-1]) if numbers else None


def _gsm8k(response: str, expected: str, anywhere: bool = False) -> bool:
    number = final_number(response, anywhere)
    return number is not None and number == final_number(expected, True)


def _gsm8k_row(place: str, row: dict) -> Example:
    question, answer = (text_field(place, row, f, f) for f in ("question", "answer"))
    prompt = f"{question}\nFirst think step by step and then answer the final number.\n"
    return {"place": place, "prompt": prompt, "completion": answer.replace("#### ", "The final answer is: ")}


def _labelled(column: str, instruction: str, labels: Sequence[str], place: str, row: dict) -> Example:
    """A row of a classification task: the text in `column`, and a label by its number."""
    value = str(row.get("label", "")).strip()
    if not value.isdigit() or int(value) >= len(labels):
        raise UsageError(f"{place}: field 'label' must be 0 to {len(labels) - 1}, this is {row.get('label')!r}")
    text = text_field(place, row, column, column)
    return {"place": place, "prompt": f"{instruction}\n\n{text.strip()}", "completion": labels[int(value)]}


class _Named(NamedTuple):
    hub: str
    config: str | None
    test: str
    row: Callable[[str, dict], Example]
    readings: tuple[Reading, Reading]


SENTIMENT = "Analyze the sentiment of the input, and respond only positive or negative"
TOPIC = f"Categorize the news article into one of the 4 categories: {', '.join(AG_NEWS)}"
NAMED = {
    "sst2": _Named(
        "stanfordnlp/sst2", None, "validation", partial(_labelled, "sentence", SENTIMENT, ("negative", "positive")),
        (_same, lambda said, label: label in said or label.capitalize() in said),
    ),
    "ag_news": _Named(
        "fancyzhx/ag_news", None, "test", partial(_labelled, "text", TOPIC, AG_NEWS),
        (_same, lambda said, label: label in said or label.lower().partition("/")[0] in said),  # "sci" is enough
    ),
    "gsm8k": _Named("openai/gsm8k", "main", "test", _gsm8k_row, (_gsm8k, partial(_gsm8k, anywhere=True))),
}  # fmt: skip
