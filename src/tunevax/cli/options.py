"""Options: dataclasses from the command line and `--config FILE`, and their `--help`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

from tunevax.errors import UsageError, unknown
from tunevax.proxy import is_proxy
from tunevax.yaml_files import meant, read_yaml

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Fields = Mapping[str, dataclasses.Field]

HIDDEN = (
    "logging_nan_inf_filter", "disable_tqdm", "remove_unused_columns", "ddp_find_unused_parameters", "logging_steps",
)  # fmt: skip
"""Options that tunevax sets for itself and `--help` omits."""
PLAIN = {
    "output_dir": "the run folder to write",
    "seed": "of data order, adapter initialisation and every named generator",
    "max_steps": "optimiser steps; overrides --num-train-epochs",
    "gradient_accumulation_steps": "micro-batches per optimiser step",
    "bf16": "mixed precision on an accelerator",
}
"""Help of options of transformers."""


class Parser(argparse.ArgumentParser):
    """argparse whose errors are `UsageError`s."""

    def error(self, message: str) -> NoReturn:
        """Raise a `UsageError`."""
        if wrong := re.match(r"argument (?:\S+/)?(--\S+): invalid (int|float) value: (.*)", message):
            kind = "a whole number" if wrong[2] == "int" else "a number"
            message = f"{wrong[1]} takes {kind}, not {wrong[3]}"
        raise UsageError(f"{self.prog.removeprefix('tunevax ')}: {message}")


def parse(
    title: str, classes: Sequence[type[DataclassInstance]], arguments: Sequence[str],
    below: Mapping[str, Any] | None = None, ignored: Collection[str] = (),
) -> tuple[Any, ...]:  # fmt: skip
    """Instances of the dataclasses from the command line, `--config FILE`, `below` and their defaults, in this order.

    `title` names the command in messages, such as `align vaccine`; further options in `ignored` are accepted without
    effect. Raises `UsageError`: an unknown option or key (with the nearest known one), or a value of the wrong type.
    """
    fields = {f.name: f for cls in classes for f in dataclasses.fields(cls) if f.init}
    if "--help" in arguments or "-h" in arguments:
        print_help(title, classes)
        raise SystemExit(0)
    from transformers.hf_argparser import HfArgumentParser

    class DataclassParser(HfArgumentParser, Parser):
        def add_argument(self, *names: Any, decides: str = "", **how: Any) -> argparse.Action:  # see mixins.DECIDES
            return super().add_argument(*names, **how)

    parser = DataclassParser(cast(Any, classes), allow_abbrev=False, prog=f"tunevax {title}")
    if "--help-all" in arguments:
        parser.print_help()
        raise SystemExit(0)
    tokens = _from_files(arguments, fields, ignored) + _typed(arguments, fields, ignored)
    given = set(map(_name, tokens))
    tokens = _tokens({k: v for k, v in (below or {}).items() if k not in given}, fields) + tokens
    for token in tokens:
        if (name := _name(token)) and name not in fields and name.removeprefix("no_") not in fields:
            raise unknown("option", token.partition("=")[0], {f"--{known.replace('_', '-')}" for known in fields})
    if "output_dir" in fields and "output_dir" not in set(map(_name, tokens)):
        raise UsageError("--output-dir is missing")
    *parsed, rest = parser.parse_args_into_dataclasses(tokens, look_for_args_file=False, return_remaining_strings=True)
    if rest:
        raise UsageError(f"{title}: unexpected {rest[0]!r}; options are written --name value")
    _name_known_facts(parsed)
    return tuple(parsed)


def _name_known_facts(parsed: Sequence[object]) -> None:
    """Restrict every proxy source among the options to the facts that the model at hand knows."""
    values = {name: value for options in parsed for name, value in vars(options).items()}
    sources = {n: v for n, v in values.items() if any(is_proxy(s) for s in (v if isinstance(v, list) else [v]))}
    models = values.get("control") or values.get("model")
    if not sources or not models:
        return
    from tunevax.scoring.knowledge import at_hand

    how = (models if isinstance(models, str) else models[0]), values.get("chat_template"), values.get("revision")
    for options in parsed:
        for name, value in vars(options).items():
            if name in sources:
                whole = [at_hand(s, *how) for s in value] if isinstance(value, list) else at_hand(value, *how)
                setattr(options, name, whole)


def value_of(name: str, arguments: Sequence[str]) -> str | None:
    """The value of an option that determines the other options, from the command line or its `--config`."""
    value = None
    for file in filter(Path.is_file, map(Path, _values_of("config", arguments))):
        content = read_yaml(file, words=True)
        if isinstance(content, dict):
            value = content.get(name, content.get(name.replace("_", "-"), value))
    value = next(iter(_values_of(name, arguments)), value)
    return None if value is None else str(value)


def _name(token: str) -> str:
    """The option that a token names, with underscores; empty if it is a value."""
    return token[2:].partition("=")[0].replace("-", "_") if token.startswith("--") else ""


def _groups(arguments: Sequence[str]) -> list[tuple[str, list[str], list[str]]]:
    """Each `--name` or `--name=value` with the values behind it, as the name, all values, and the tokens."""
    groups: list[list[str]] = []
    for token in arguments:
        if token.startswith("--") or not groups:
            groups.append([])
        groups[-1].append(token)
    return [(_name(group[0]), group[0].split("=", 1)[1:] + group[1:], group) for group in groups]


def _values_of(name: str, arguments: Sequence[str]) -> list[str]:
    """The first value of each occurrence of an option."""
    return [value for option, values, _ in _groups(arguments) if option == name for value in values[:1]]


def _typed(arguments: Sequence[str], fields: Fields, ignored: Collection[str]) -> list[str]:
    """The options of the command line, with repeated list options joined (`--model A --model B`)."""
    tokens: list[str] = []
    lists: dict[str, list[str]] = {}
    for name, values, group in _groups(arguments):
        if name == "config":
            tokens = [*values[1:], *tokens]  # values too many, for the parser to refuse
        elif name in fields and "list" in str(fields[name].type):
            lists.setdefault(name, []).extend(values)
        elif name not in ignored and name.removeprefix("no_") not in ignored:
            tokens += group
    return tokens + [token for name, values in lists.items() for token in (f"--{name}", *values)]


def _from_files(arguments: Sequence[str], fields: Fields, ignored: Collection[str]) -> list[str]:
    """The options of every `--config FILE` that the command line lacks, as tokens."""
    given = set(map(_name, arguments))
    tokens: list[str] = []
    for path in _values_of("config", arguments):
        content, typed = read_yaml(path, words=True), read_yaml(path)
        if not isinstance(content, dict):
            raise UsageError(f"{path} must hold `option: value` lines")
        for key, value in content.items():
            name = str(key).replace("-", "_")
            if name in ignored:
                continue
            if name not in fields:
                raise UsageError(f"{path}: {unknown('key', str(key), fields)}")
            if value is None and fields[name].default is not None:
                raise UsageError(f"{path}: {key} has no value; give it one, or leave the line out for the default")
            if name not in given:
                tokens += _tokens({name: typed[key] if isinstance(value, dict) else value}, fields)
    return tokens


def _tokens(options: Mapping[str, Any], fields: Fields) -> list[str]:
    """Option values from YAML as command-line tokens, so that one parser converts every value."""
    tokens: list[str] = []
    for name, value in ((n, v) for n, v in options.items() if v is not None):
        kind = fields[name].type if name in fields else str
        values = [meant(v, name, kind) for v in (value if isinstance(value, list) else [value])]
        words = [json.dumps(v) if isinstance(v, bool | dict) else str(v) for v in values]
        if isinstance(value, list) and "list" in str(kind):
            tokens += [f"--{name}", *words]
        else:  # `=`, because a value may begin with a dash; a list for an option that takes names with commas
            tokens.append(f"--{name}={','.join(words)}")
    return tokens


def print_help(title: str, classes: Sequence[type[DataclassInstance]]) -> None:
    """Print the options that tunevax declares: the model, the method's own, then those of training in general."""
    from rich.console import Console
    from rich.table import Table

    class Page(Console):
        def on_broken_pipe(self) -> None:
            """Raise, as `print` does; rich exits with 1."""
            raise

    fields = {f.name: f for cls in reversed(classes) for f in dataclasses.fields(cls) if f.init}
    own = [base for cls in classes for base in cls.__mro__ if base.__name__ != "TrainingArguments"]
    names = ["model", *[name for cls in own for name in cls.__dict__.get("__annotations__", {})], *PLAIN]
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for name in dict.fromkeys(n for n in names if n in fields and n not in HIDDEN):  # no class variables
        field = fields[name]
        default = field.default_factory() if callable(field.default_factory) else field.default
        shown = " ".join(map(str, default)) if isinstance(default, list) else "" if default is None else str(default)
        words = PLAIN.get(name) or field.metadata.get("help", "")
        table.add_row(f"--{name.replace('_', '-')}", words, f"[dim]{shown}[/dim]")
    Page().print(f"tunevax {title}\n", table, sep="\n", highlight=False)
    if "max_steps" in fields:
        print("\nand every field of transformers.TrainingArguments; `--help-all` shows them.")
