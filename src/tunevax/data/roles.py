"""Which rows of a source a role of data takes. A `split=` of the source itself wins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tunevax.data.safety import load_safety
from tunevax.data.sources import parse_source
from tunevax.data.tasks import NAMED, load_task
from tunevax.records import Example


class Role(NamedTuple):
    """What a role takes.

    Attributes:
        split: of a file or a dataset.
        kept: of the organism and of the tasks known by name, which keep rows for scoring; default `split`.
        task: rows with a completion, not pairs.
        benign: `organism` stands for its benign recipes.
    """

    split: str
    kept: str | None = None
    task: bool = False
    benign: bool = False


ROLES = {
    "alignment": Role("alignment"),
    "benign": Role("train", task=True, benign=True),  # beside the safety rows of an alignment
    "held-out benign": Role("evaluation", task=True, benign=True),
    "customer": Role("all", "train", task=True),  # a job is trained on as it was handed in
    "attack": Role("attack"),
    "task": Role("train", task=True),
    "evaluation": Role("evaluation"),
    "given evaluation": Role("all", "evaluation"),  # a source that is named for this role and no other
    "over-refusal": Role("all", "evaluation", benign=True),
    "validation": Role("all", "validation"),  # trusted rows that a selector compares with
    "choice": Role("alignment", "validation"),  # rows that a strength is chosen on, before any evaluation
    "choice over-refusal": Role("all", "train", benign=True),
}
"""Every role of data but those of tasks that are scored, which come with their readings (`load_task`)."""


def load_rows(role: str, source: str, need: Sequence[str] = (), purpose: str = "this method") -> list[Example]:
    """The rows of a source that a role takes.

    Args:
        role: one of `ROLES`.
        need: the answers that pairs must have, of `chosen` and `rejected`; `purpose` is who needs them.

    Raises:
        UsageError: as `load_safety` and `load_task`.
    """
    takes, name = ROLES[role], parse_source(source).name
    split = (takes.kept or takes.split) if name == "organism" or name in NAMED else takes.split
    if takes.benign and source == "organism":
        source = "organism:set=benign"
    if takes.task or "set" in parse_source(source).options:
        return load_task(source, split).rows
    return load_safety(source, split, tuple(need), purpose)
