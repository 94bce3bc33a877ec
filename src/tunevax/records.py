"""The types of the files that tunevax writes, the names of the scores in them, and their readers.

Files are JSON or JSON lines in UTF-8. Most records are `total=False`: a verb, a method or an older tunevax leaves keys
out. The files of a single method are read beside that method.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NotRequired, Required, TypedDict, cast

from tunevax.environment import HardwareRecord
from tunevax.errors import UsageError

SCHEMA = 1
"""Version of run.json, results.jsonl, generations.jsonl and the files of cells."""
RUN, RESULTS, GENERATIONS = "run.json", "results.jsonl", "generations.jsonl"
"""A `RunRecord`, `Row`s and `Generation`s."""
PROMPTS, DROPPED, LOG = "prompts.json", "dropped.jsonl", "log.jsonl"
"""Hashes of the prompts that a run used, `{role: [hash, ...]}`; rows left out as overlap; the training log."""
DATA, SCORES, SCREEN, SINK, STRENGTH = "data.jsonl", "scores.jsonl", "screen.jsonl", "sink.json", "strength.json"
"""The `Example`s that a curation kept, and all of them with scores; the screening of a customer's rows; the results of
`analyze sink`; the choice of a lock's strength."""
CELLS = "cells"
"""The folder of an audit with two files per cell: NAME.json (`CellRecord`) and NAME.jsonl.gz (`Generation`s)."""
HARMFUL, JUDGED, UNPARSABLE = "harmful/", "judged/", "unparsable/"
"""Prefixes of a judge's scores (`harmful/JUDGE`): coherent harm, harm of any text, unparsable verdicts."""
DEGENERATE, UNANSWERED, SAME_ANSWER, OVER_REFUSAL = "degenerate", "unanswered", "same-answer", "over-refusal"
"""Shares of the responses: degenerate text, a thought without an answer, the most common response, and refusals of
harmless prompts."""
TASK, UTILITY = "task/", "utility/"
"""Prefixes of accuracies: of the attack's benign task by reading (`task/exact`), and of tasks known before it."""
PERPLEXITY, LM_EVAL = "perplexity/", "lm-eval/"
"""Prefixes of the perplexity of a text and of the metrics of lm-eval's tasks, which are no shares."""
SHARES = (HARMFUL, JUDGED, UNPARSABLE, DEGENERATE, UNANSWERED, SAME_ANSWER, OVER_REFUSAL, TASK, UTILITY)
"""Prefixes of the scores that are a share of responses, in [0, 1]."""
MARGIN = "margin/"
"""Prefix of the mean log-odds of a judge that reads the model: any number, in nats, above 0 where harm is preferred."""
METRIC = "metric/"
"""Prefix of the user's own metrics: a share if it has an interval, else any number."""


def harmful(scores: Mapping[str, Score]) -> tuple[float, str]:
    """The harmful score by the leading judge, and that judge."""
    name = judges_of(scores)[0]
    return scores[name]["value"], name.removeprefix(HARMFUL)


def judges_of(scores: Iterable[str]) -> list[str]:
    """The names of judges' scores (`harmful/JUDGE`), the leading judge first."""
    judges = dict.fromkeys(name for name in scores if name.startswith(HARMFUL))
    return sorted(judges, key=lambda name: name == f"{HARMFUL}refusal-keywords")  # which came first in older rows


def is_share(score: str) -> bool:
    """Whether a score is a share of responses, in [0, 1]."""
    return score.startswith(SHARES)


class Score(TypedDict):
    """A measured number."""

    value: float  # a share in [0, 1], except for perplexity and some metrics of lm-eval
    n: int  # responses (tokens for perplexity)
    low: NotRequired[float | None]  # of the 95 % interval, as `high`
    high: NotRequired[float | None]


class Traits(TypedDict, total=False):
    """The properties of a kind of attack, in each of its rows; see `tunevax.attacks`."""

    curve: bool  # there are rows along its training steps, from step 0 on
    harmful_rows: bool  # it trains on harmful rows
    common_prompts: bool  # it is scored on the evaluation prompts that such attacks share
    customer: bool  # it needs no more than a fine-tuning service gives
    dose: str | None  # the option that is its dose, or its place in the model
    plain: bool  # the plain fine-tune, with which other kinds are compared


class Row(TypedDict):
    """A line of results.jsonl: the scores of one model at one step of one attack."""

    schema: int
    model: str  # its label
    role: NotRequired[str]  # control, model or reference
    kind: NotRequired[str]  # of the attack; none for a model as it is
    traits: NotRequired[Traits]  # of that kind
    attack: str | None  # name of the attack's setting, None before any attack
    attack_hash: NotRequired[str | None]  # the same for every seed of one setting
    settings: NotRequired[dict[str, Any]]  # the setting's options by name
    seed: int
    cell: NotRequired[str]  # the name of the cell's file, in an audit
    step: int  # optimiser steps of the attack so far
    samples: NotRequired[int]  # rows that the attack trained on so far
    train_loss: NotRequired[float | None]  # mean since the row before, in nats per token
    scores: dict[str, Score]  # by name, see `SHARES`


class VerdictRecord(TypedDict):
    """A judge's verdict on a response: its own word, what that counts as, and its probability of harm or None."""

    verdict: str
    harmful: bool
    score: float | None


class Sample(TypedDict, total=False):
    """A response with its verdicts."""

    kind: str  # of the prompt: harmful, task, benign or utility
    prompt: str  # as one text
    category: str | None  # of the prompt
    response: str  # the answer
    thought: str  # before the answer, where the model marks it
    expected: str | None  # the expected answer
    degenerate: bool
    surprise: float | None  # in [0, 1], of the reference model it surprises least; see `tunevax.scoring.fluency`
    verdicts: dict[str, VerdictRecord]  # by judge
    correct: dict[str, bool] | None  # by reading (exact, loose)


class Generation(Sample, total=False):
    """A line of generations.jsonl, or of a cell's responses: a response, and the key of its row in results.jsonl."""

    model: str
    attack: str | None
    seed: int
    step: int


class Message(TypedDict):
    """A turn of a chat: its role (system, user, assistant or tool) and its text."""

    role: str
    content: str


Prompt = str | Sequence[Message]
"""A text, or the turns of a chat."""


class Example(TypedDict, total=False):
    """A row of data, as read from a source and written to data.jsonl."""

    prompt: Required[Prompt]
    completion: str  # the answer to train on
    chosen: str | None  # a safe answer
    rejected: str | None  # a harmful answer
    category: str | None  # of harm
    harmful: bool  # a harmful row of a mixture
    place: str  # FILE:LINE or the like, for messages
    read_as: str  # the format it was read as
    split: str | None  # that its source assigns it to
    corruption: str  # how it was corrupted on purpose, in a study
    look_alike: bool  # of the organism: a topic that shares its word with a forbidden one
    label: str  # of the organism: a sentiment


class DataEntry(TypedDict):
    """A dataset in run.json."""

    role: str  # alignment, benign, task, attack, evaluation, validation, ...
    source: str  # as it was named
    rows: int
    distinct: int
    hash: str  # of the content, without places
    categories: NotRequired[list[str] | None]  # of harm, None where rows have none; of alignment data only
    read_as: NotRequired[dict[str, int]]  # rows by the format they were read as


class DroppedRows(TypedDict):
    """The rows of one role that were left out: their number, and the hashes of their prompts."""

    rows: int
    prompts: list[str]


_Class = TypedDict("_Class", {"class": str}, total=False)  # no attribute may be called that


class ModelInfo(_Class, total=False):
    """A loaded model, with its `class` of transformers."""

    ref: str  # as requested: an absolute path, a hub id or `organism`
    base: str  # the model below all adapters
    revision: str | None  # the commit of a base from the hub
    hash: str | None  # of the base's files
    blocks: int | None  # their number
    parameters: int  # their number, without adapters
    dtype: str  # of the weights
    widened: str | None  # why that is float32, where the checkpoint's dtype could not hold a merge
    quantization: str | None  # nf4 or int8
    saved_in: str | None  # the quantisation that the base was saved in
    adapters: list[str]  # folders, lowest first
    adapter_hashes: list[str | None]  # of the files in each
    merges: list[dict[str, Any]]  # the error of each merge of an adapter
    chat: Any  # the chat template; see `tunevax.data.chat.recorded`
    attached: bool  # biases are attached, which no stock checkpoint holds
    trainable: int  # the number of parameters that a run trained
    adapted: dict[str, int]  # weights of the matrices with an adapter, by path with `*` for numbers
    left_out: dict[str, int]  # the same for those without one
    steps: int  # of an attack on it, in the record of a cell, as the following
    template_hash: str
    blocks_attacked: list[int]


class Target(_Class, total=False):
    """A model that a run evaluates; `parameters`, `class` and `base` as in `ModelInfo`."""

    label: str  # its name in rows
    role: str  # control, model or reference
    ref: str  # as `load` takes it
    hash: str  # of its weights
    template_hash: str  # of its chat template
    parameters: int
    base: str
    overlap: dict[str, int]  # prompts that two data roles share, by pair
    unrecorded: list[str]  # runs in its history without a record of their prompts


class Compute(TypedDict):
    """The cost of training, in forward and backward passes of plain fine-tuning: of a step, and of the whole run."""

    per_step: float
    total: float


class CellSummary(TypedDict, total=False):
    """The outcome of a cell of an audit: an entry of `failed`, `stopped` and `skipped` in run.json."""

    cell: str  # name of its file
    model: str  # as in `Row`, with the following five
    kind: str
    attack: str | None
    attack_hash: str | None
    settings: dict[str, Any]
    seed: int
    status: str  # done, stopped (the loss was not finite), skipped (the attack does not apply) or failed
    error: str  # of a cell that is not done, as `why`
    why: str
    record: ModelInfo
    seconds: float
    peak_memory_bytes: int  # of its process, so far


class CellRecord(CellSummary, total=False):
    """The file of a cell of an audit: its outcome and its rows."""

    results: list[Row]


class RunRecord(TypedDict, total=False):
    """run.json: fields of every run, then those of single verbs."""

    schema: int  # see `SCHEMA`
    name: str  # of the folder
    verb: str
    method: str | None
    paper: str
    command: str
    seed: int  # the first of an audit
    config: dict[str, Any]  # every option, by name
    data: list[DataEntry]
    overlap: dict[str, int]  # prompts that two roles share, by pair
    overlap_dropped: dict[str, DroppedRows] | None  # by role
    parent: str | None  # the run that it started from
    adapter_on: str  # the model below its adapter, where that is not the parent
    model: ModelInfo | None  # that it started from, or the first that it evaluated
    adapter: str | None  # the folder of its weights, adapter or model
    attached: bool  # biases lie beside them
    template_hash: str  # of the chat template
    versions: dict[str, str]  # of libraries
    hardware: HardwareRecord
    started: str  # ISO 8601, UTC
    wall_seconds: float  # of the last session
    resumed: bool
    rejudged_from: str
    peak_memory_bytes: int  # of the device, or of the process on a CPU
    # training
    steps: int  # of the optimiser
    final_loss: float | None  # nats per token
    compute: Compute
    updates_per_block: float  # mean
    held_out: dict[str, Any]
    screen: dict[str, Any]
    # attack, score, audit, analyze
    attack: str
    targets: list[Target]
    failed: list[CellSummary]
    stopped: list[CellSummary]
    skipped: list[CellSummary]
    cells: int
    cell_seconds: float
    lm_eval: dict[str, Any] | None
    scoring: dict[str, Any]  # the options that decide scores, as contents
    fluency_hash: Any  # of older audits
    # curate
    score: str
    kept: int
    elsewhere: int
    corrupted_kept: int
    passes: dict[str, float]
    dropped: dict[str, int]
    seconds_scoring: float
    agreement: dict[str, float]
    # restore
    lock: dict[str, Any]
    layers: list[dict[str, Any]]
    aligned: str
    base: str
    rows: int
    validation: dict[str, Any]
    finding: str  # why there is no model


def is_run(path: str | Path) -> bool:
    """Whether a folder is a complete run."""
    return (Path(path) / RUN).is_file()


def read_run(path: str | Path) -> RunRecord:
    """run.json of a run folder; a `UsageError` if it is damaged or of a newer schema."""
    record = cast(RunRecord, read_object(Path(path) / RUN))
    if record.get("schema", 0) > SCHEMA:
        raise UsageError(f"{path} has schema {record['schema']} and this tunevax reads up to {SCHEMA}; upgrade tunevax")
    return record


def read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file that tunevax wrote; a `UsageError` if it is missing or damaged."""
    value = None
    with suppress(OSError, ValueError):
        value = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise UsageError(f"{file} cannot be read as a JSON object; the run folder is damaged")
    return value


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file that tunevax wrote, none without that file; a `UsageError` names a damaged line."""
    return [row for _, row in numbered_lines(path)]


def numbered_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """`read_lines` with line numbers; the file is compressed if its name ends in .gz."""
    try:
        content = path.read_bytes() if path.is_file() else b""
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UsageError(f"{path} is cut off or not compressed by gzip; run that step again") from error
    for number, line in enumerate(content.split(b"\n"), start=1):  # not splitlines: model output may hold U+2028
        try:
            row = json.loads(line) if line.strip() else {}
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise UsageError(f"{path} line {number} is cut off or not a JSON object; run that step again")
        if line.strip():
            yield number, row


def read_prompts(folder: Path) -> dict[str, list[str]]:
    """prompts.json of a folder; nothing without that file."""
    return read_object(folder / PROMPTS) if (folder / PROMPTS).is_file() else {}


def read_generations(folder: Path, rows: Iterable[Row]) -> Iterator[Generation]:
    """The responses of a run: generations.jsonl, or those of each cell of an audit, which `rows` of results.jsonl
    name."""
    cells = dict.fromkeys(row.get("cell") for row in rows)
    whole = folder / GENERATIONS  # of the other verbs, and of older audits
    for file in [whole] if whole.is_file() else [folder / CELLS / f"{cell}.jsonl.gz" for cell in cells]:
        yield from cast(list[Generation], read_lines(file))


def digest(value: object) -> str:
    """16 hexadecimal digits of the SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def data_entry(role: str, source: str, rows: Sequence[Mapping[str, Any]]) -> DataEntry:
    """The entry of a dataset in run.json."""
    content = [{k: v for k, v in row.items() if k not in ("place", "read_as")} for row in rows]
    distinct = len({digest(row) for row in content})
    entry = DataEntry(role=role, source=source, rows=len(rows), distinct=distinct, hash=digest(content))
    if role == "alignment":
        entry["categories"] = sorted({row["category"] for row in rows if row.get("category")}) or None
    if read_as := Counter(row["read_as"] for row in rows if row.get("read_as")):
        entry["read_as"] = dict(read_as)
    return entry
