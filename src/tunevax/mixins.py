"""Options that several verbs take: each says once what it is called, what it is by default and what it does."""

from __future__ import annotations

from dataclasses import dataclass, field

from tunevax.errors import UsageError

TEMPLATE_HELP = (
    "own (the tokenizer's, the default), alpaca, plain, none, or a jinja file; behind a colon thinking=off asks for no "
    "thought, thought=OPEN|CLOSE names the marks around one, and the template's own variables are set"
)


@dataclass
class LoadOptions:
    """How to load a model."""

    chat_template: str | None = field(default=None, metadata={"help": TEMPLATE_HELP})
    revision: str | None = field(default=None, metadata={"help": "revision of a hub id"})
    dtype: str = field(default="auto", metadata={"help": "of the weights: auto, float32, bfloat16, float16"})


@dataclass
class ModelOptions(LoadOptions):
    """Which model, and how to load it."""

    model: str | None = field(default=None, metadata={"help": "hub id, model folder, run folder, or organism"})


@dataclass
class ModelsOptions(LoadOptions):
    """Which models, and how to load them."""

    model: list[str] = field(
        default_factory=list, metadata={"help": "hub id, model folder or run folder; may be repeated"}
    )


@dataclass
class TrainedModelOptions(ModelOptions):
    """A model that is trained: its frozen weights may be quantised."""

    quantization: str | None = field(
        default=None,
        metadata={"help": "of the frozen weights in the blocks, below the adapter: nf4 or int8; default off"},
    )


@dataclass
class AllowOverlap:
    """What to do when data roles share prompts: stop, or go on."""

    allow_overlap: bool = field(default=False, metadata={"help": "go on when data roles share prompts, and record it"})


@dataclass
class Overlap(AllowOverlap):
    """What to do when data roles share prompts: stop, go on, or leave the prompts out."""

    drop_overlap: bool = field(
        default=False,
        metadata={
            "help": "leave prompts out that are in two data roles, and record them: out of an attack, and out of the "
            "scoring what a model was trained on; the same for every model"
        },
    )


@dataclass
class RunOptions:
    """The run folder."""

    overwrite: bool = field(default=False, metadata={"help": "replace a finished run"})


@dataclass
class ResumableRunOptions(RunOptions):
    """The folder of a run that can be continued."""

    resume: bool = field(default=False, metadata={"help": "continue an unfinished run"})


def require_given(options: object, *names: str) -> None:
    """Raise `UsageError` for the first of these options that was left out."""
    for name in names:
        if not getattr(options, name):
            raise UsageError(f"--{name.replace('_', '-')} is missing")
