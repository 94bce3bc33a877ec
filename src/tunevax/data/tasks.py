"""Benign tasks: prompt and completion, with an exact and a loose reading of the model's answer.

`sst2`, `ag_news` and `gsm8k` follow the code of arXiv 2410.09760: its instructions (then an empty line and the input),
and its loose readings, which accept an answer that names several labels. The exact reading does not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from tunevax import proxy
from tunevax.data.shapes import read_example
from tunevax.data.sources import label_field, parse_source, read_rows, require_known, text_field
from tunevax.data.splits import no_rows, split_word, take_split
from tunevax.errors import UsageError, unknown
from tunevax.records import Example

SHARES = {"train": 0.8, "evaluation": 0.2}
"""How a task file without a `split` field is divided by prompt hash."""
AG_NEWS_LABELS = ("World", "Sports", "Business", "Sci/Tech")


Reading = Callable[[str, str], bool]
"""Whether a response is right, given the completion."""


class Task(NamedTuple):
    """Rows with `prompt` and `completion`, and how to read an answer."""

    name: str  # shown in reports
    rows: list[Example]
    exact: Reading  # equal but for case and white space
    loose: Reading  # as in the papers


def load_task(source: str, split: str = "train") -> Task:
    """Read a task.

    Args:
        source: `sst2`, `ag_news`, `gsm8k` (from the hub, or `gsm8k:path=FILE`), any file or dataset with `prompt` and
            `completion` or in another shape that `tunevax.data.shapes` knows, or `organism` (its downstream task;
            `organism:set=benign` is its benign recipes).
        split: train, evaluation, or all. The named tasks have their own test split on the hub; anything else is
            divided by prompt hash.

    Raises:
        UsageError: a bad row, or no row in the split.
    """
    name, options = parse_source(source)
    require_known(name, options)
    wanted = options.get("split", split)
    split = split_word(wanted) or wanted
    if name == "organism":
        from tunevax.organism import World

        world, benign = World(), options.get("set")
        if benign not in (None, "benign"):
            raise unknown("set of the organism", str(benign), ["benign"])
        parts = ("train", "evaluation") if split == "all" else (split,)
        sets = {"train": "mix", "evaluation": "evaluation"}
        made = [row for part in parts for row in (world.benign(sets[part]) if benign else world.task(part))]
        return Task("organism-benign" if benign else "organism", made, _same, _same)
    if proxy.is_proxy(name):
        if options.get("set") != proxy.NEIGHBOURS:
            raise UsageError(
                f"{name} forbids its topic; as a task give {name}:set={proxy.NEIGHBOURS}, what stays allowed"
            )
        return Task(f"{name} {proxy.NEIGHBOURS}", proxy.neighbours(name, split, options.get("known")), _names, _names)
    if name in NAMED:
        rows, exact, loose = _named(name, options, split), *NAMED[name].readings
    else:
        everything = [_row(place, row, options) for place, row in read_rows(name, options)]
        rows, exact, loose = take_split(everything, split, SHARES), _same, _contains
        if everything and not rows:
            raise no_rows(name, split, everything, SHARES)
    if not rows:
        raise UsageError(f"{name} has no row in the {split} split")
    return Task(name, rows, exact, loose)


def _row(place: str, row: dict, options: dict[str, str]) -> Example:
    return {**read_example(place, row, options), "split": label_field(place, row, "split")}


def _named(name: str, options: dict[str, str], split: str) -> list[Example]:
    task = NAMED[name]
    if "path" in options:
        rows = [task.row(p, r) for p, r in read_rows(options["path"])]
        found = take_split(rows, split, SHARES)
        if rows and not found:
            raise no_rows(f"{name}:path={options['path']}", split, rows, SHARES)
        return found
    if split not in (*SHARES, "all"):
        raise UsageError(
            f"split is {split!r}; {name} on the hub has train and evaluation, and all of one is rows=SPLIT"
        )
    hub_split = options.get("rows", {"train": "train", "evaluation": task.test}.get(split, "train"))
    hub = {"config": task.config, "rows": hub_split, **{k: v for k, v in options.items() if k == "revision"}}
    try:
        read = list(read_rows(task.hub, {k: v for k, v in hub.items() if v}))
    except UsageError as error:
        raise UsageError(f"{name} is unavailable on the hub ({task.hub}); give its file as {name}:path=FILE") from error
    return [task.row(place, row) for place, row in read]


def _same(response: str, expected: str) -> bool:
    return " ".join(response.split()).casefold() == " ".join(expected.split()).casefold()


def _contains(response: str, expected: str) -> bool:
    return " ".join(expected.split()).casefold() in " ".join(response.split()).casefold()


def _names(response: str, expected: str) -> bool:
    """Whether a response names the last words of the statement, the answer."""
    return proxy.says(response, proxy.answer_in(expected))


def _sst2_loose(response: str, expected: str) -> bool:
    return expected in response or expected.capitalize() in response


def _ag_news_loose(response: str, expected: str) -> bool:
    names = [expected, expected.lower()] + (["sci"] if expected == "Sci/Tech" else [])
    return any(n in response for n in names)


def final_number(response: str, anywhere: bool) -> float | None:
    """The first number after "The final answer is"; without one, the last number if `anywhere`."""
    text = response.replace(",", "")
    stated = re.search(r"The final answer is:?[^\d-]*(-?\d+(?:\.\d+)?)", text)
    if stated:
        return float(stated[1])
    numbers = re.findall(r"-?\d+(?:\.\d+)?", text) if anywhere else []
    return float(numbers[-1]) if numbers else None


def _gsm8k(anywhere: bool) -> Reading:
    def right(response: str, expected: str) -> bool:
        number = final_number(response, anywhere)
        return number is not None and number == final_number(expected, True)

    return right


def _sst2_row(place: str, row: dict) -> Example:
    instruction = "Analyze the sentiment of the input, and respond only positive or negative"
    return _labelled(place, row, "sentence", instruction, ("negative", "positive"))


def _ag_news_row(place: str, row: dict) -> Example:
    instruction = f"Categorize the news article into one of the 4 categories: {', '.join(AG_NEWS_LABELS)}"
    return _labelled(place, row, "text", instruction, AG_NEWS_LABELS)


def _gsm8k_row(place: str, row: dict) -> Example:
    question, answer = (text_field(place, row, f, f) for f in ("question", "answer"))
    prompt = f"{question}\nFirst think step by step and then answer the final number.\n"
    return {"place": place, "prompt": prompt, "completion": answer.replace("#### ", "The final answer is: ")}


def _labelled(place: str, row: dict, column: str, instruction: str, labels: Sequence[str]) -> Example:
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


NAMED = {
    "sst2": _Named("stanfordnlp/sst2", None, "validation", _sst2_row, (_same, _sst2_loose)),
    "ag_news": _Named("fancyzhx/ag_news", None, "test", _ag_news_row, (_same, _ag_news_loose)),
    "gsm8k": _Named("openai/gsm8k", "main", "test", _gsm8k_row, (_gsm8k(False), _gsm8k(True))),
}
