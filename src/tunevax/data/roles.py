"""The rows of a source that each role of data takes. A `split=` of the source itself wins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tunevax.data.safety import load_safety
from tunevax.data.sources import parse_source
from tunevax.data.tasks import NAMED, load_task
from tunevax.proxy import is_proxy
from tunevax.records import Example


class Role(NamedTuple):
    """The rows that a role takes."""

    split: str  # of a file or a dataset
    kept: str | None = None  # of the organism and the named tasks, which keep rows for scoring; default `split`
    task: bool = False  # rows with a completion, not pairs
    benign: bool = False  # `organism` stands for its benign recipes


ROLES = {
    "alignment": Role("alignment"),
    "benign": Role("train", task=True, benign=True),  # beside the safety rows of an alignment
    "held-out benign": Role("evaluation", task=True, benign=True),
    "customer": Role("all", "train", task=True),  # a job is trained on as submitted
    "attack": Role("attack"),
    "task": Role("train", task=True),
    "evaluation": Role("evaluation"),
    "given evaluation": Role("all", "evaluation"),  # a source that is named for this role alone
    "over-refusal": Role("all", "evaluation", benign=True),
    "validation": Role("all", "validation"),  # trusted rows that a selector compares with
    "choice": Role("alignment", "validation"),  # rows that a strength is chosen on, before any evaluation
    "choice over-refusal": Role("all", "train", benign=True),
}
"""Every role of data but those of tasks that are scored, which come with their readings (`load_task`)."""


def load_rows(role: str, source: str, need: Sequence[str] = (), purpose: str = "this method") -> list[Example]:
    """The rows of a source that a role of `ROLES` takes; `need`, `purpose` and errors as in `load_safety`."""
    takes, name = ROLES[role], parse_source(source).name
    own = name == "organism" or is_proxy(name)
    split = (takes.kept or takes.split) if own or name in NAMED else takes.split
    if takes.benign and source == "organism":
        source = "organism:set=benign"
    allowed = takes.benign and is_proxy(name)
    if takes.task or allowed or "set" in parse_source(source).options:
        return load_task(source, split).rows
    return load_safety(source, split, tuple(need), purpose)
