"""Options that several verbs take: each says once what it is called, what it is by default and what it does.

The metadata `decides` of an option of an audit says how far it goes: see `DECIDES`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypeVar, cast

from tunevax.errors import UsageError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

TEMPLATE_HELP = (
    "own (the tokenizer's, the default), alpaca, plain, none, or a jinja file; behind a colon thinking=off asks for no "
    "thought, thought=OPEN|CLOSE names the marks around one, and the template's own variables are set"
)

DECIDES = ("nothing", "cells", "rows", "scores")
"""What an option decides at most: `nothing` that an audit finds (where and how fast it runs); which `cells` there are;
the `rows` of a cell, whose cause run.json holds as a hash, so that two audits may name it differently; or how they are
scored. An option without a mark decides the scores: a mark that is forgotten makes cells run again, never stale."""

T = TypeVar("T")


def option(default: T, help: str, decides: str = DECIDES[-1]) -> T:
    """A field of a dataclass of options: its default, the words of `--help`, and what it decides."""
    if isinstance(default, list):
        return field(default_factory=lambda: cast(T, list(default)), metadata={"help": help, "decides": decides})
    return field(default=default, metadata={"help": help, "decides": decides})


@dataclass
class LoadOptions:
    """How to load a model."""

    chat_template: str | None = option(None, TEMPLATE_HELP, decides="rows")
    revision: str | None = option(None, "revision of a hub id", decides="rows")
    dtype: str = option("auto", "of the weights: auto, float32, bfloat16, float16")


@dataclass
class ModelOptions(LoadOptions):
    """Which model, and how to load it."""

    model: str | None = option(None, "hub id, model folder, run folder, or organism")


@dataclass
class ModelsOptions(LoadOptions):
    """Which models, and how to load them."""

    model: list[str] = option([], "hub id, model folder or run folder; may be repeated", decides="cells")


@dataclass
class TrainedModelOptions(ModelOptions):
    """A model that is trained: its frozen weights may be quantised."""

    quantization: str | None = option(
        None, "of the frozen weights in the blocks, below the adapter: nf4 or int8; default off"
    )


@dataclass
class AllowOverlap:
    """What to do when data roles share prompts: stop, or go on."""

    allow_overlap: bool = option(False, "go on when data roles share prompts, and record it", decides="cells")


@dataclass
class Overlap(AllowOverlap):
    """What to do when data roles share prompts: stop, go on, or leave the prompts out."""

    drop_overlap: bool = option(
        False,
        "leave prompts out that are in two data roles, and record them: out of an attack, and out of the "
        "scoring what a model was trained on; the same for every model",
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
    """The options that decide at least so much, of `DECIDES`."""
    marks = {f.name: f.metadata.get("decides", DECIDES[-1]) for f in fields(options)}
    return {name: getattr(options, name) for name, mark in marks.items() if DECIDES.index(mark) >= DECIDES.index(least)}


def require_given(options: object, *names: str) -> None:
    """Raise `UsageError` for the first of these options that was left out."""
    for name in names:
        if not getattr(options, name):
            raise UsageError(f"--{name.replace('_', '-')} is missing")
