"""Rows from a hub id or a local JSONL, JSON, CSV or parquet file, each with the place it came from.

A source is written `NAME` or `NAME:key=value,key=value`. The keys are `split` (alignment, attack, evaluation or
all), `revision`, `config` and `rows` (the split of a hub dataset, or a slice such as train[:1000]), `path` (the
local file of a named task), and any field name, to say which column holds it: `harm.csv:prompt=goal,rejected=target`.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tunevax.errors import UsageError, unknown
from tunevax.runs import is_run, read_run

FILE_ENDINGS = (".jsonl", ".json", ".csv", ".parquet")


KEYS = (
    "split", "revision", "config", "rows", "path", "set", "held_out",
    "prompt", "chosen", "rejected", "category", "completion",
)  # fmt: skip
"""All options of sources. One may serve as safety data and as benign rows, so that each loader takes those of both."""


class Source(NamedTuple):
    """A parsed source: its name (a file, folder or hub id) and its options."""

    name: str
    options: dict[str, str]


def parse_source(text: str) -> Source:
    """Split `NAME:key=value,...` into name and options."""
    match = re.fullmatch(r"(.+?)(?::(\w+=[^,]*(?:,\w+=[^,]*)*))?", text)
    if match is None:
        raise UsageError(f"cannot read the data source {text!r}; write NAME or NAME:key=value,key=value")
    pairs = [pair.split("=", 1) for pair in match[2].split(",")] if match[2] else []
    return Source(match[1], dict(pairs))


def require_known(name: str, options: dict[str, str]) -> None:
    """Raise a UsageError for an option that no source has."""
    for key in options:
        if key not in KEYS:
            raise unknown(f"option of the data source {name}", key, KEYS)


def require_columns(name: str, options: dict[str, str], fields: Iterable[str], rows: Iterable[dict]) -> None:
    """Raise a UsageError for a column that a source names for one of its fields and that no row has."""
    named = {field: options[field] for field in fields if field in options}
    if not named:
        return
    columns = {column for row in rows for column in row}
    for field, column in named.items():
        if columns and column not in columns:
            raise unknown(f"column for {field} in {name}:", column, columns)


def read_rows(name: str, options: dict[str, str] | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, row) for each row; place is `file:line` for text files and `name[index]` otherwise. The folder of
    a curation run stands for the rows it kept.

    Raises:
        UsageError: the file is missing, of an unknown kind, or a line is not a JSON object.
    """
    path, options = Path(name), options or {}
    if (path / "data.jsonl").is_file():  # a curation run
        path = path / "data.jsonl"
    if path.suffix in FILE_ENDINGS:
        if not path.is_file():
            raise UsageError(f"no such file: {name}")
        try:
            yield from {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}[path.suffix](path)
        except UnicodeDecodeError as error:
            raise UsageError(f"{name} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
        except PermissionError as error:
            raise UsageError(f"no permission to read {name}") from error
    elif is_run(path):
        raise UsageError(f"{name} is a run of tunevax {read_run(path).get('verb')} and holds no rows; name a data file")
    elif not path.exists() and path.parent != Path() and path.parent.is_dir():
        raise UsageError(f"no such file or folder: {name}")
    elif path.is_file():
        raise UsageError(f"{name} is not one of {', '.join(FILE_ENDINGS)}; convert or rename it")
    else:
        yield from _hub(name, options)


def _jsonl(path: Path) -> Iterator[tuple[str, dict]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            place = f"{path}:{number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UsageError(f"{place}: broken JSON ({error.msg} at column {error.colno})") from error
            if not isinstance(row, dict):
                raise UsageError(f"{place}: a row must be a JSON object, this is a {type(row).__name__}")
            yield place, row


def _json(path: Path) -> Iterator[tuple[str, dict]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UsageError(f"{path}:{error.lineno}: broken JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(rows, list):
        raise UsageError(f"{path}: a .json dataset must be a list of objects, this is a {type(rows).__name__}")
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UsageError(f"{path}[{index}]: a row must be a JSON object, this is a {type(row).__name__}")
        yield f"{path}[{index}]", row


def _csv(path: Path) -> Iterator[tuple[str, dict]]:
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        for row in reader:
            if None in row:
                raise UsageError(f"{path}:{reader.line_num}: more fields than the header names; quote the commas")
            yield f"{path}:{reader.line_num}", row


def _parquet(path: Path) -> Iterator[tuple[str, dict]]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise UsageError(f"{path} is not a parquet file") from error
    for index, row in enumerate(rows):
        yield f"{path}[{index}]", row


def _hub(name: str, options: dict[str, str]) -> Iterator[tuple[str, dict]]:
    import datasets

    try:
        rows = datasets.load_dataset(
            name, options.get("config"), split=options.get("rows", "train"), revision=options.get("revision")
        )
    except Exception as error:  # the hub client raises many kinds; each means: not to be had
        raise UsageError(
            f"no dataset {name!r}: not a local file, and the hub answered {type(error).__name__}; "
            "check the name, or give a local .jsonl, .json, .csv or .parquet file"
        ) from error
    for index, row in enumerate(rows):
        yield f"{name}[{index}]", row


def text_field(place: str, row: dict[str, Any], field: str, column: str) -> str:
    """The string in `row[column]`, for the field `field`.

    Raises:
        UsageError: missing, empty, or not a string; names the place, the field and the way out.
    """
    if column in row and row[column] is None:
        raise UsageError(f"{place}: field '{column}' is null")
    if column not in row:
        raise UsageError(
            f"{place}: no field '{column}' (fields: {', '.join(map(str, row))}); "
            f"say which column holds it with SOURCE:{field}=COLUMN"
        )
    value = row[column]
    if not isinstance(value, str):
        raise UsageError(f"{place}: field '{column}' must be a string, this is a {type(value).__name__}")
    if not value.strip():
        raise UsageError(f"{place}: field '{column}' is empty")
    return value
