"""File formats: readers of local files of rows, by the ending of the name. One format, one function.

A reader takes a path and returns (place, row) pairs, `file:line` or `file[index]` and a dict; or several such splits by
name."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from tunevax.errors import UsageError
from tunevax.methods import load_method, methods

METHODS = {
    **dict.fromkeys(("jsonl", "json", "ndjson"), "tunevax.data.formats:read_json"),
    **dict.fromkeys(("csv", "tsv"), "tunevax.data.formats:read_csv"), "parquet": "tunevax.data.formats:read_parquet",
}  # fmt: skip
"""The ending of a file's name to `module:attribute`; other packages add theirs by the entry-point group
`tunevax.formats`."""
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")

Rows = Iterable[tuple[str, dict[str, Any]]]
Splits = dict[str, Rows]
"""The rows of each split. A file has one, `train`, unless its reader gives several."""
TWICE = object()
"""The value of a key or column that occurs twice in a row with different values."""


def ending(path: Path) -> str:
    """The ending of a file's name: `csv` of a.csv and of A.CSV.gz."""
    whole = Path(path.name.lower())
    return (Path(whole.stem) if whole.suffix in COMPRESSED else whole).suffix.removeprefix(".")


def read_file(path: Path) -> Splits:
    """The rows of a file by split. Raises `UsageError` if there is no reader for such a file, or it is damaged."""
    known = methods(__name__)
    if ending(path) not in known:
        raise UsageError(f"{path} is not one of {', '.join(f'.{name}' for name in known)}; convert or rename it")
    rows = load_method(__name__, ending(path))(path)
    return rows if isinstance(rows, dict) else {"train": rows}


def text_of(path: Path) -> str:
    """The text of a file, unpacked and without byte order marks. Raises `UsageError` if it is damaged or not text; the
    line is named."""
    import bz2
    import gzip
    import lzma
    import zlib

    data = path.read_bytes()
    if data.startswith(b"\x28\xb5\x2f\xfd"):
        raise UsageError(f"{path} is compressed with zstd; unpack it, or use gzip")
    unpackers = {b"\x1f\x8b": gzip.decompress, b"BZh": bz2.decompress, b"\xfd7zXZ": lzma.decompress}
    unpack = next((unpackers[magic] for magic in unpackers if data.startswith(magic)), bytes)
    try:
        data = unpack(data)
    except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
        raise UsageError(f"{path} cannot be unpacked ({error}); it is damaged or cut off") from error
    encoding = json.detect_encoding(data)  # by its mark, or by the zeros of the first characters
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line, kind = data.count(b"\n", 0, error.start) + 1, encoding.upper().removesuffix("-SIG")
        why = f"not {kind} text (byte {error.start} of the file)"
        raise UsageError(f"{path}:{line}: {why}; save it as UTF-8") from error
    return text.removeprefix("\ufeff").replace("\n\ufeff", "\n")  # joined files have marks in the middle


def _named(pairs: Iterable[tuple[str, object]]) -> dict[str, Any]:
    """Values by name, `TWICE` where a name occurs with different values."""
    named: dict[str, Any] = {}
    for name, value in pairs:
        named[name] = value if name not in named or named[name] == value else TWICE
    return named


DECODER = json.JSONDecoder(
    object_pairs_hook=_named,
    # Python refuses to convert numbers of more than 4,300 digits.
    parse_int=lambda digits: int(digits) if len(digits) < 4000 else digits,
    parse_constant=lambda word: None if word == "NaN" else float(word.replace("Infinity", "inf")),
)
"""Reads NaN, which pandas writes for a missing value, as None."""


def _decode(place: str, text: str, in_lines: bool = False) -> Any:
    """The JSON value of a text. `place` is that of a line, or if `in_lines` the name of a file of several."""
    try:
        return DECODER.decode(text)
    except json.JSONDecodeError as error:
        where = f"{place}:{error.lineno}" if in_lines else place
        raise UsageError(f"{where}: broken JSON ({error.msg} at column {error.colno})") from error
    except RecursionError as error:
        raise UsageError(f"{place}: broken JSON (nested too deeply)") from error


def read_json(path: Path) -> Rows | Splits:
    """JSON lines, a list of objects, an object of columns, or an object of several lists, each a split."""
    text = text_of(path)
    lines = [(f"{path}:{n}", line) for n, line in enumerate(io.StringIO(text, newline=None), 1) if line.strip()]
    if not lines:
        return []
    by_line = ending(path) != "json"
    place, first = lines[0]
    try:
        value = _decode(place, first)
    except UsageError as error:
        try:
            value = _decode(str(path), text, in_lines=True)
        except UsageError as whole:
            raise (error if by_line and first.strip() not in ("[", "{") else whole) from None
    else:
        if len(lines) > 1 or (by_line and isinstance(value, dict)):
            return _objects((at, _decode(at, line)) for at, line in lines)
    if isinstance(value, list):
        return _items(str(path), value)
    if not isinstance(value, dict):
        return _objects([(place, value)])
    return _lists(path, value) or _columns(path, value) or [(place, value)]


def _objects(rows: Iterable[tuple[str, object]]) -> Rows:
    for place, row in rows:
        if not isinstance(row, dict):
            raise UsageError(f"{place}: a row must be a JSON object, this is a {type(row).__name__}")
        yield place, row


def _items(name: str, rows: Sequence[object]) -> Rows:
    return _objects((f"{name}[{index}]", row) for index, row in enumerate(rows))


def _lists(path: Path, value: dict[str, Any]) -> Rows | Splits:
    """The lists of rows that an object holds by name; none if the object is itself a row."""
    lists = {k: v for k, v in value.items() if isinstance(v, list) and v and all(isinstance(row, dict) for row in v)}
    splits: Splits = {key: _items(f"{path}.{key}", rows) for key, rows in lists.items()}
    if any({"role", "from"} & set(row) for rows in lists.values() for row in rows[:1]):  # messages
        return {}
    return splits if len(splits) != 1 else next(iter(splits.values()))


def _columns(path: Path, value: dict[str, Any]) -> Rows:
    """The rows of an object of columns, each a list or, as pandas writes it, an object by row number."""
    values = list(value.values())
    if all(isinstance(v, dict) and v.keys() == values[0].keys() for v in values):
        columns = [list(v.values()) for v in values]
    elif all(isinstance(v, list) and len(v) == len(values[0]) for v in values):
        if any(v and isinstance(v[0], dict) for v in values):  # a row of conversations
            return []
        columns = values
    else:
        return []
    return ((f"{path}[{i}]", dict(zip(value, row, strict=True))) for i, row in enumerate(zip(*columns, strict=True)))


def read_csv(path: Path) -> Rows:
    """Comma, tab or semicolon separated values; the first line names the columns."""
    text = text_of(path)
    csv.field_size_limit(2**31 - 1)  # of one field; the default is 131,072 characters
    line = text.lstrip("\r\n").partition("\n")[0]
    delimiter = "\t" if ending(path) == "tsv" else next((sign for sign in ",\t;" if sign in line), ",")
    number = skipped = 0
    if stated := re.match(r"sep=(.)\r?\n", text):  # as Excel states it
        text, delimiter, skipped = text[stated.end() :], stated[1], 1
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    try:
        for fields in reader:
            number = reader.line_num
            if not any(fields):
                continue
            if not header:
                header = [name.strip() for name in fields]
                continue
            place = f"{path}:{number + skipped}"
            if any(fields[len(header) :]):
                raise UsageError(f"{place}: more fields than the header names; quote the commas")
            yield place, _named(zip_longest(header, fields[: len(header)]))
    except csv.Error as error:
        way = "a quote inside a quoted field is written twice"
        raise UsageError(f"{path}:{number + skipped + 1}: broken CSV ({error}); {way}") from error


def read_parquet(path: Path) -> Rows:
    """The rows of a parquet file."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path).read()
        rows = list(zip(*(column.to_pylist() for column in table.columns), strict=True))
    except PermissionError:
        raise
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} has text that is not UTF-8") from error
    except (pyarrow.ArrowException, OSError) as error:
        raise UsageError(f"{path} is not a parquet file") from error
    return [(f"{path}[{i}]", _named(zip(table.column_names, row, strict=True))) for i, row in enumerate(rows)]
