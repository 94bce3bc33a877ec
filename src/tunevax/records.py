"""The type of every file that tunevax writes, the names of the scores in them, and how they are read.

A file is JSON or JSON lines in UTF-8. A key that a verb, a method or an older tunevax does not write is absent, so most
records are `total=False`. Each file has one writer and one reader: what concerns every run folder is read here, a
method's own files beside the method.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, Required, TypedDict, cast

from tunevax.errors import UsageError

SCHEMA = 1
"""Version of run.json, results.jsonl, generations.jsonl and the files of cells."""

RUN, RESULTS, GENERATIONS = "run.json", "results.jsonl", "generations.jsonl"
"""A `RunRecord`, `Row`s and `Generation`s."""
PROMPTS, DROPPED, LOG = "prompts.json", "dropped.jsonl", "log.jsonl"
"""Hashes of the prompts that a run used, `{role: [hash, ...]}`; `DroppedRow`s; what training logged, a line a step."""
DATA, SCORES, SCREEN, SINK, STRENGTH = "data.jsonl", "scores.jsonl", "screen.jsonl", "sink.json", "strength.json"
"""Of single verbs and methods: the `Example`s that a curation kept, and all of them with their scores; the screening of
a customer's rows; what `analyze sink` measured; the choice of a lock's strength."""
CELLS = "cells"
"""The folder of an audit with two files for each cell: NAME.json (`CellRecord`) and NAME.jsonl.gz (`Generation`s)."""

# --- scores ----------------------------------------------------------------------------------------------------------

HARMFUL, JUDGED, UNPARSABLE = "harmful/", "judged/", "unparsable/"
"""Prefixes of a judge's scores (`harmful/JUDGE`): coherent harm, harm of any text, verdicts that cannot be read."""
DEGENERATE, UNANSWERED, SAME_ANSWER, OVER_REFUSAL = "degenerate", "unanswered", "same-answer", "over-refusal"
"""Shares of the responses: degenerate text, a thought without an answer, the most common response, and of responses to
harmless prompts those that refuse."""
TASK, UTILITY = "task/", "utility/"
"""Prefixes of accuracies: of the attack's benign task by reading (`task/exact`), and of tasks known before it."""
PERPLEXITY, LM_EVAL = "perplexity/", "lm-eval/"
"""Prefixes of what is no share: the perplexity of a text, and the metrics of lm-eval's tasks."""
SHARES = (HARMFUL, JUDGED, UNPARSABLE, DEGENERATE, UNANSWERED, SAME_ANSWER, OVER_REFUSAL, TASK, UTILITY)
"""How the name of a score begins that is a share of responses, in [0, 1]."""
METRIC = "metric/"
"""Prefix of what a metric of the user's choice gives: a share if it has an interval, else any number."""


def harmful(scores: Mapping[str, Score]) -> tuple[float, str]:
    """The harmful score, by the judge that leads, and that judge."""
    name = judges_of(scores)[0]
    return scores[name]["value"], name.removeprefix(HARMFUL)


def judges_of(scores: Iterable[str]) -> list[str]:
    """Of the names of scores those of judges (`harmful/JUDGE`), the lead first.

    Evaluation writes a judge that may not lead behind the others. In rows written before that the refusal keywords,
    the only judge of that kind, stand where the user named them.
    """
    found = dict.fromkeys(name for name in scores if name.startswith(HARMFUL))
    return sorted(found, key=lambda name: name == f"{HARMFUL}refusal-keywords")


def is_share(score: str) -> bool:
    """Whether a score is a share of responses, in [0, 1]."""
    return score.startswith(SHARES)


class Score(TypedDict):
    """A measured number."""

    value: float  # a share in [0, 1], but for perplexity and some metrics of lm-eval
    n: int  # responses behind it (tokens for perplexity)
    low: NotRequired[float | None]  # of its 95 % interval, as `high`
    high: NotRequired[float | None]


class Traits(TypedDict, total=False):
    """What a kind of attack says of itself in each of its rows; see `tunevax.attacks`."""

    curve: bool  # there are rows along its training steps, from step 0 on
    harmful_rows: bool  # it trains on harmful rows
    common_prompts: bool  # it is scored on the evaluation prompts that all such attacks share
    customer: bool  # it takes no more than a fine-tuning service gives
    dose: str | None  # the option that is its dose, or its place in the model, or None
    plain: bool  # the plain fine-tune, which other kinds are contrasted with


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
    cell: NotRequired[str]  # of an audit, the name of the cell's file
    step: int  # optimiser steps of the attack so far
    samples: NotRequired[int]  # rows that the attack trained on so far
    train_loss: NotRequired[float | None]  # mean since the row before, in nats per token
    scores: dict[str, Score]  # by name, see `SHARES`; None for what could not be measured


class VerdictRecord(TypedDict):
    """A judge's opinion of a response: its own word, what that counts as, and its probability of harm or None."""

    verdict: str
    harmful: bool
    score: float | None


class Sample(TypedDict, total=False):
    """A response and what was made of it."""

    kind: str  # harmful, task, benign or utility: what its prompt is for
    prompt: str  # as one text
    category: str | None  # of the prompt, or None
    response: str  # the answer
    thought: str  # what the model wrote before the answer, where it marks that
    expected: str | None  # the answer that is wanted, or None
    degenerate: bool  # it is no coherent text
    surprise: float | None  # nats per token that it costs the reference model it surprises least
    verdicts: dict[str, VerdictRecord]  # by judge
    correct: dict[str, bool] | None  # by reading (exact, loose), or None


class Generation(Sample, total=False):
    """A line of generations.jsonl, or of a cell's responses: a response, and the row of results.jsonl it is behind."""

    model: str
    attack: str | None
    seed: int
    step: int


# --- data ------------------------------------------------------------------------------------------------------------


class Message(TypedDict):
    """A turn of a chat: its role (system, user, assistant or tool) and its text."""

    role: str
    content: str


Prompt = str | Sequence[Message]
"""A text, or the turns of a chat."""


class Example(TypedDict, total=False):
    """A row of data, as it is read from a source and written to data.jsonl."""

    prompt: Required[Prompt]
    completion: str  # the answer to train on
    chosen: str | None  # a safe answer
    rejected: str | None  # a harmful answer
    category: str | None  # of harm, or None
    harmful: bool  # this row of a mixture is a harmful one
    place: str  # FILE:LINE, or another name of where it is from, for messages
    read_as: str  # the format it was read as
    split: str | None  # that its source assigns it to
    corruption: str  # what was done to it on purpose, in a study
    look_alike: bool  # of the organism: a topic that shares its word with a forbidden one
    label: str  # of the organism: a sentiment


class DataEntry(TypedDict):
    """A dataset in run.json."""

    role: str  # alignment, benign, task, attack, evaluation, validation, ...
    source: str  # as it was named
    rows: int  # read from it
    distinct: int  # of these, different ones
    hash: str  # of the content, without places
    categories: NotRequired[list[str] | None]  # of harm, None where rows have none; alignment data alone
    read_as: NotRequired[dict[str, int]]  # by format, how many rows were read as that


class DroppedRow(TypedDict):
    """A line of dropped.jsonl: a row that --drop-overlap left out, and the role of data that has its prompt too."""

    role: str
    also_in: str
    place: str | None
    prompt: str | list[Message]
    hash: str


class DroppedRows(TypedDict):
    """Of one role in run.json: how many rows were left out, and the hashes of their prompts."""

    rows: int
    prompts: list[str]


# --- run.json --------------------------------------------------------------------------------------------------------

_Class = TypedDict("_Class", {"class": str}, total=False)  # no attribute may be called that


class ModelInfo(_Class, total=False):
    """A loaded model, with its `class` of transformers."""

    ref: str  # what was asked for: an absolute path, a hub id or `organism`
    base: str  # the model below all adapters
    revision: str | None  # the base's commit, of a hub id
    hash: str | None  # of the base's files, or None
    blocks: int | None  # how many
    parameters: int  # how many, without adapters
    dtype: str  # of the weights
    widened: str | None  # why that is float32 where the checkpoint's could not hold a merge
    quantization: str | None  # nf4, int8 or None
    saved_in: str | None  # the quantisation that the base was saved in, or None
    adapters: list[str]  # folders, lowest first
    adapter_hashes: list[str | None]  # of the files in each
    merges: list[dict[str, Any]]  # how each merge of an adapter went
    chat: Any  # how prompts are put into words
    attached: bool  # biases are attached, which no stock checkpoint holds
    trainable: int  # how many parameters a run trained
    adapted: dict[str, int]  # matrices with an adapter, by path with `*` for numbers: how many weights
    left_out: dict[str, int]  # those without one
    steps: int  # of an attack on it, in the record of a cell, as what follows
    template_hash: str
    blocks_attacked: list[int]


class Target(_Class, total=False):
    """A model that a run measures; `parameters`, `class` and `base` as in `ModelInfo`."""

    label: str  # its name in rows
    role: str  # control, model or reference
    ref: str  # what `load` takes
    hash: str  # of its weights
    template_hash: str  # of its chat template
    parameters: int
    base: str
    overlap: dict[str, int]  # by pair of data roles, how many prompts both have
    unrecorded: list[str]  # runs in its history that do not say which prompts they used


class Compute(TypedDict):
    """What training costs, in forward and backward passes of plain fine-tuning: a step of the run, and all of it."""

    per_step: float
    total: float


class HardwareRecord(TypedDict):
    """The machine: kind of processor, cores, memory in GiB, name of the GPU or None, processes of the run."""

    cpu: str
    cores: int | None
    memory_gib: float
    gpu: str | None
    processes: int


class CellSummary(TypedDict, total=False):
    """How a cell of an audit ended: an entry of `failed`, `stopped` and `skipped` in run.json.

    Attributes:
        cell: name of its file. model, kind, attack, attack_hash, settings, seed: as in `Row`.
        status: done, stopped (the loss was not finite), skipped (the attack does not apply) or failed.
        error, why: of a cell that is not done.
        record: what was loaded and done.
        seconds: that it took. peak_memory_bytes: of its process, so far.
    """

    cell: str
    model: str
    kind: str
    attack: str | None
    attack_hash: str | None
    settings: dict[str, Any]
    seed: int
    status: str
    error: str
    why: str
    record: ModelInfo
    seconds: float
    peak_memory_bytes: int


class CellRecord(CellSummary, total=False):
    """The file of a cell of an audit: how it ended, and its rows."""

    results: list[Row]


class RunRecord(TypedDict, total=False):
    """run.json.

    Attributes:
        schema: see `SCHEMA`. name: of the folder. verb, method, paper, command: what was run.
        seed: of the run, the first of an audit. config: every option, by name.
        data: the datasets. overlap: by pair of roles, how many prompts both have. overlap_dropped: by role.
        parent: the run that it started from, or None. adapter_on: what its adapter sits on, where that is another.
        model: what it started from, or the first that it measured; None if it loaded none.
        adapter: the folder of its weights, adapter or model, or None. attached: biases lie beside them.
        template_hash: of the chat template. versions: of libraries. hardware: the machine.
        started: ISO 8601, UTC. wall_seconds: of the last session. resumed: there was one before.
        peak_memory_bytes: of the device, or of the process on a CPU.

        steps, final_loss, compute, updates_per_block, held_out, screen: of training. Steps are the optimiser's, the
            loss is in nats per token, updates are a mean over blocks.
        attack, targets, failed, stopped, skipped, cells, cell_seconds, lm_eval, scoring: of what measures models;
            scoring holds the options that decide scores, as contents.
        score, kept, elsewhere, corrupted_kept, passes, dropped, seconds_scoring, agreement: of a curation.
        lock, layers, aligned, base, rows, validation, finding: of a restoration; a finding is why there is no model.
    """

    schema: int
    name: str
    verb: str
    method: str | None
    paper: str
    command: str
    seed: int
    config: dict[str, Any]
    data: list[DataEntry]
    overlap: dict[str, int]
    overlap_dropped: dict[str, DroppedRows] | None
    parent: str | None
    adapter_on: str
    model: ModelInfo | None
    adapter: str | None
    attached: bool
    template_hash: str
    versions: dict[str, str]
    hardware: HardwareRecord
    started: str
    wall_seconds: float
    resumed: bool
    rejudged_from: str
    peak_memory_bytes: int
    # training
    steps: int
    final_loss: float | None
    compute: Compute
    updates_per_block: float
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
    scoring: dict[str, Any]
    fluency_hash: Any  # of older audits
    # curate
    score: str
    kept: int
    elsewhere: int
    corrupted_kept: int
    spoilt_kept: int  # its name in older runs
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
    finding: str


# --- reading ---------------------------------------------------------------------------------------------------------


def is_run(path: str | Path) -> bool:
    """Whether a folder is a complete run."""
    return (Path(path) / RUN).is_file()


def read_run(path: str | Path) -> RunRecord:
    """run.json of a run folder.

    Raises:
        UsageError: it is broken, or of a newer schema.
    """
    record = cast(RunRecord, read_object(Path(path) / RUN))
    if record.get("schema", 0) > SCHEMA:
        raise UsageError(f"{path} has schema {record['schema']} and this tunevax reads up to {SCHEMA}; upgrade tunevax")
    return record


def read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file that tunevax wrote.

    Raises:
        UsageError: it is gone, or no JSON object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        value = None
    if not isinstance(value, dict):
        raise UsageError(f"{file} cannot be read as a JSON object; the run folder is damaged")
    return value


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file that tunevax wrote; none without that file.

    Raises:
        UsageError: a line is cut off or no JSON object; it is named.
    """
    return [row for _, row in numbered_lines(path)]


def numbered_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) for each line of a JSONL file, compressed if its name ends in .gz; as `read_lines`."""
    content = path.read_bytes() if path.is_file() else b""
    if content and path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise UsageError(f"{path} is cut off or not compressed by gzip; run that step again") from error
    for number, line in enumerate(content.split(b"\n"), start=1):  # not splitlines: model output may hold U+2028
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise UsageError(f"{path} line {number} is cut off or not a JSON object; run that step again")
        yield number, row


def read_prompts(folder: Path) -> dict[str, list[str]]:
    """prompts.json of a folder; nothing without that file."""
    return read_object(folder / PROMPTS) if (folder / PROMPTS).is_file() else {}


def read_generations(folder: Path, rows: Iterable[Row]) -> Iterator[Generation]:
    """The responses of a run: of generations.jsonl, or of an audit those of one cell after the other.

    Args:
        rows: those of its results.jsonl, which name the cells.
    """
    cells = dict.fromkeys(row.get("cell") for row in rows)
    whole = folder / GENERATIONS  # of the other verbs, and of older audits
    for file in [whole] if whole.is_file() else [folder / CELLS / f"{cell}.jsonl.gz" for cell in cells]:
        yield from cast(list[Generation], read_lines(file))


# --- identities ------------------------------------------------------------------------------------------------------


def digest(value: object) -> str:
    """16 hexadecimal digits of the SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def data_entry(role: str, source: str, rows: Sequence[Mapping[str, Any]]) -> DataEntry:
    """What run.json says of one dataset."""
    content = [{k: v for k, v in row.items() if k not in ("place", "read_as")} for row in rows]
    entry: DataEntry = {
        "role": role,
        "source": source,
        "rows": len(rows),
        "distinct": len({digest(r) for r in content}),
        "hash": digest(content),
    }
    if role == "alignment":
        entry["categories"] = sorted({row["category"] for row in rows if row.get("category")}) or None
    if read_as := Counter(row["read_as"] for row in rows if row.get("read_as")):
        entry["read_as"] = dict(read_as)
    return entry
