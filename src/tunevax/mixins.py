"""Options that several verbs share."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypeVar, cast

from tunevax.errors import UsageError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

TEMPLATE_HELP = (
    "own (the tokenizer's, the default), alpaca, plain, none, or a jinja file; after a colon thinking=off disables "
    "thinking, thought=OPEN|CLOSE gives the marks around a thought, and the template's own variables are set"
)

DECIDES = ("nothing", "cells", "rows", "scores")
"""The results of an audit that an option may change, each including those before it: `nothing` (where and how fast it
runs); the list of `cells`; the `rows` of a cell, with a hash of the option's content in run.json, so that two audits
may name it differently; or, the default, their `scores`. A forgotten mark thus makes cells run again, never stale."""

T = TypeVar("T")


def option(default: T, help: str, decides: str = DECIDES[-1]) -> T:
    """A field of a dataclass of options, with its help and, of `DECIDES`, the results that it may change."""
    metadata = {"help": help, "decides": decides}
    if isinstance(default, list):
        return field(default_factory=lambda: cast(T, list(default)), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class LoadOptions:
    """How to load a model."""

    chat_template: str | None = option(None, TEMPLATE_HELP, decides="rows")
    revision: str | None = option(None, "revision of a hub id", decides="rows")
    dtype: str = option("auto", "of the weights: auto, float32, bfloat16, float16")


@dataclass
class ModelOptions(LoadOptions):
    """Which model, and how to load it."""

    model: str | None = option(None, "hub id, model folder, run folder, GGUF file, or organism")


@dataclass
class ModelsOptions(LoadOptions):
    """Which models, and how to load them."""

    model: list[str] = option([], "hub id, model folder, run folder or GGUF file; may be repeated", decides="cells")


@dataclass
class TrainedModelOptions(ModelOptions):
    """A model to train, whose frozen weights may be quantised."""

    quantization: str | None = option(None, "of the frozen weights in the blocks: nf4 or int8; default off")


@dataclass
class AllowOverlap:
    """What to do when data roles share prompts: stop or continue."""

    allow_overlap: bool = option(False, "continue when data roles share prompts, and record it", decides="cells")


@dataclass
class Overlap(AllowOverlap):
    """What to do when data roles share prompts: stop, continue, or drop the prompts."""

    drop_overlap: bool = option(
        False,
        "drop and record prompts in two data roles: from an attack, and trained ones from the evaluation of all models",
        decides="cells",
    )


@dataclass
class RunOptions:
    """The run folder."""

    overwrite: bool = option(False, "replace a finished run", decides="nothing")


@dataclass
class ResumableRunOptions(RunOptions):
    """The folder of a run that can be continued."""

    resume: bool = option(False, "continue an unfinished run")


def deciding(options: DataclassInstance, least: str) -> dict[str, Any]:
    """The options that may change at least these results, of `DECIDES`."""
    marks = {f.name: f.metadata.get("decides", DECIDES[-1]) for f in fields(options)}
    return {name: getattr(options, name) for name, mark in marks.items() if DECIDES.index(mark) >= DECIDES.index(least)}


def require_given(options: object, *names: str) -> None:
    """Raise `UsageError` for the first missing one of these options."""
    for name in names:
        if not getattr(options, name):
            raise UsageError(f"--{name.replace('_', '-')} is missing")
