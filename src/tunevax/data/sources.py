"""Rows from a hub id, a local file or a folder, each with the place it came from.

Files are JSONL, JSON, CSV, TSV or parquet, also compressed (gzip, bzip2, xz), or of a format that another package reads
(see `tunevax.data.formats`). Text is UTF-8, UTF-16 or UTF-32. A JSON file is a list of objects, one object per line, an
object with one such list, or an object of columns. A folder is a dataset saved by `datasets`, or files that `datasets`
sorts into splits.

A source is written `NAME` or `NAME:key=value,key=value`. The keys are `split` (alignment, attack, evaluation or
all), `revision`, `config` and `rows` (the split of a dataset, or a slice such as train[:1000]; without it `train`, or
the only split), `path` (the local file of a named task), and any field name, to say which column holds it:
`harm.csv:prompt=goal,rejected=target`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tunevax.data.formats import TWICE, Rows, Splits, ending, read_file
from tunevax.data.splits import split_word
from tunevax.errors import UsageError, nearby, unknown
from tunevax.files import model_hash
from tunevax.lineage import Lineage
from tunevax.methods import methods
from tunevax.records import DATA, LOG, is_run, read_run

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

FORMATS = "tunevax.data.formats"
KEYS = (
    "split", "revision", "config", "rows", "path", "set", "held_out", "known",
    "prompt", "chosen", "rejected", "category", "completion",
)  # fmt: skip
"""All options of sources. A source may be safety data and benign rows at once, so every loader accepts all of them."""


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


def parse_known(text: str, split: str) -> tuple[str, dict[str, str], str]:
    """The name and the options of a source, and the split that it names, else `split`. Raises a UsageError for an
    option that no source has."""
    name, options = parse_source(text)
    for key in options.keys() - set(KEYS):
        raise unknown(f"option of the data source {name}", key, KEYS)
    wanted = options.get("split", split)
    return name, options, split_word(wanted) or wanted


def read_rows(name: str, options: dict[str, str] | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, row) for each row; place is `file:line` for text files and `name[index]` otherwise. The folder of
    a curation run gives the rows it kept. A key that occurs twice with different values is `TWICE` in the row. Raises
    `UsageError` if the file is missing, of an unknown kind or damaged, or it is unclear which split is meant."""
    path, options = Path(name), options or {}
    try:
        if is_run(path):
            if not (path / DATA).is_file():
                verb = read_run(path).get("verb")
                raise UsageError(f"{name} is a run of tunevax {verb} and holds no rows; name a data file")
            path = path / DATA  # a curation run
        if path.exists():
            splits = _folder(path, options) if path.is_dir() else read_file(path)
            yield from _take(name, splits, options.get("rows"))
        elif ending(path) in methods(FORMATS):
            raise UsageError(f"no such file: {name}{nearby(name)}")
        elif path.parent != Path() and path.parent.is_dir():
            raise UsageError(f"no such file or folder: {name}{nearby(name)}")
        else:
            yield from _hub(name, options)
    except PermissionError as error:
        raise UsageError(f"no permission to read {error.filename or name}") from error


def _folder(path: Path, options: dict[str, str]) -> Splits:
    """A folder saved by `datasets`, or one whose files it sorts into splits by their names or a README."""
    import datasets

    config = options.get("config")
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return _dataset(str(path), datasets.load_from_disk(str(path)))
        builder = datasets.load_dataset_builder(str(path), config)
        files = {str(s): [Path(f) for f in found] for s, found in (builder.config.data_files or {}).items()}
        read = {file for found in files.values() for file in found}
        used, known = {ending(file) for file in read}, set(methods(FORMATS))
        if used - known:
            return _dataset(str(path), datasets.load_dataset(str(path), config))
    except Exception as error:  # many kinds; each means that it has no dataset
        why, choose = _reason(str(path), error)
        way = f"name a file in it{choose}"
        raise UsageError(f"{path} is a folder that cannot be read as a dataset ({why}); {way}") from error
    passed_over = {ending(file) for file in path.iterdir()} & known - used - {"json"}  # metadata
    if passed_over and list(files) == ["train"] and not any("train" in file.name for file in read):
        some, others = (", ".join(f".{name}" for name in sorted(names)) for names in (used, passed_over))
        why = f"{path} has files of several kinds, of which only {some} would be read and {others} not"
        raise UsageError(f"{why}; name one file, or sort them into folders")
    return {s: (row for file in found for row in _take(str(file), read_file(file), None)) for s, found in files.items()}


def _hub(name: str, options: dict[str, str]) -> Iterator[tuple[str, dict]]:
    import datasets

    wanted = options.get("rows")
    try:
        found = datasets.load_dataset(name, options.get("config"), split=wanted, revision=options.get("revision"))
    except Exception as error:  # the hub client raises many kinds; each means: unavailable
        why, choose = _reason(name, error)
        why = f"{type(error).__name__} ({why})" if isinstance(error, ValueError) else type(error).__name__
        raise UsageError(
            f"no dataset {name!r}: not a local file, and the hub answered {why}; check the name, or give a local "
            f".jsonl, .json, .csv or .parquet file{choose or nearby(name)}"
        ) from error
    splits = _dataset(name, found)
    yield from _take(name, splits, None) if wanted is None else next(iter(splits.values()))


def _reason(name: str, error: Exception) -> tuple[str, str]:
    """The first line of a library's error; or the list of configurations that it has, and how to choose one."""
    text = str(error).strip() or type(error).__name__
    if "config name" in text.lower():
        return " ".join(text.split())[:300], f", or choose with {name}:config=NAME"
    return text.splitlines()[0].rstrip(".:"), ""


def _dataset(name: str, found: DatasetDict | Dataset) -> Splits:
    """The splits of a `DatasetDict`, or a `Dataset` as the only one."""
    splits = dict(found) if isinstance(found, dict) else {str(found.split or "train"): found}

    def rows(split: str, data: Dataset) -> Iterator[tuple[str, dict]]:
        for index, row in enumerate(data.with_format(None)):  # undo a numpy or torch format that was saved
            yield f"{name}{'' if split == 'train' else '/' + split}[{index}]", row

    return {str(split): rows(str(split), data) for split, data in splits.items()}


def _take(name: str, splits: Splits, wanted: str | None) -> Rows:
    """The rows of the wanted split or slice; of `train` or the only split by default."""
    some = next(iter(splits), "train")
    if wanted is None and len(splits) > 1 and "train" not in splits:
        raise UsageError(f"{name} has the splits {', '.join(splits)} and no train; say which with {name}:rows={some}")
    if wanted is None:
        return splits.get("train", splits.get(some, []))
    if wanted in splits:
        return splits[wanted]
    import datasets

    named = [part.split("[")[0].strip() for part in wanted.split("+")]
    every = {split: list(rows) for split, rows in splits.items() if split in named}
    try:
        parts = datasets.ReadInstruction.from_spec(wanted).to_absolute({s: len(rows) for s, rows in every.items()})
    except (ValueError, AssertionError) as error:
        way = f"write rows={some} or rows={some}[:100]"
        raise UsageError(f"{name} has no rows {wanted!r}: it has the splits {', '.join(splits)}; {way}") from error
    return [row for part in parts for row in every[part.splitname][part.from_ : part.to]]


def text_field(place: str, row: Mapping[str, object], field: str, column: str) -> str:
    """The string in `row[column]`, for the field `field`. Raises `UsageError` if it is missing, empty, given twice, or
    not a string of characters."""
    if column not in row:
        way = f"say which column holds it with SOURCE:{field}=COLUMN"
        raise UsageError(f"{place}: no field '{column}' ({columns_of(place, row)}); {way}")
    value, where = row[column], f"{place}: field '{column}'"
    if value is None:
        raise UsageError(f"{where} is null")
    if value is TWICE:
        way = f"remove or rename one, or name another column with SOURCE:{field}=COLUMN"
        raise UsageError(f"{where} occurs twice with different values; {way}")
    if not isinstance(value, str):
        raise UsageError(f"{where} must be a string, this is a {type(value).__name__}; quote it")
    if not value.strip():
        raise UsageError(f"{where} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"position {error.start + 1} (the lone surrogate {value[error.start]!a})"
        raise UsageError(f"{where} has half a character at {half}; remove it") from error
    return value


def label_field(place: str, row: Mapping[str, object], column: str) -> str | None:
    """The category or split of a row as a string; None where it has none. A list of names is joined, and so are the
    names of an object (BeaverTails) whose value is true. Raises `UsageError` for a value that is given twice or none of
    these."""
    value = row.get(column)
    if isinstance(value, dict):
        value = [name for name, yes in value.items() if yes]
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        value = ", ".join(value)
    if value is None or value == "" or value != value:  # NaN
        return None
    return text_field(place, {column: str(value) if isinstance(value, int | float) else value}, column, column)


def columns_of(place: str, row: Mapping[str, object]) -> str:
    """The fields of a row, for a message; long names and lists are cut."""
    names = [str(name).encode("utf-8", "backslashreplace").decode() for name in row]
    names = [name if len(name) <= 40 else f"{name[:40]}..." for name in names]
    names = names if len(names) <= 20 else [*names[:20], "..."]
    header = "; the first line of a CSV names them" if re.search(r"\.[ct]sv\b[^/]*$", place.lower()) else ""
    return f"fields: {', '.join(names)}{header}"


def contents(value: object) -> object:
    """The value of an option with files and models replaced by hashes of their content, inside lists too."""
    if isinstance(value, list | tuple):
        return [contents(v) for v in value]
    if not isinstance(value, str):
        return value
    path = Path(parse_source(value.removeprefix("hf:")).name)
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    if is_run(path):
        log = path / LOG
        return [Lineage.of(path).identity, hashlib.sha256(log.read_bytes()).hexdigest() if log.is_file() else None]
    return model_hash(value.removeprefix("hf:")) or value
