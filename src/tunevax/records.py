"""The type of every file that tunevax writes, the names of the scores in them, and how they are read.

A file is JSON or JSON lines in UTF-8. A key that a verb, a method or an older tunevax does not write is absent, so most
records are `total=False`. Each file has one writer and one reader: what concerns every run folder is read here, a
method's own files beside the method.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from tunevax.errors import UsageError

SCHEMA = 1
"""Version of run.json, results.jsonl, generations.jsonl and the files of cells."""

RUN, RESULTS, GENERATIONS, LOG = "run.json", "results.jsonl", "generations.jsonl", "log.jsonl"
"""The files of a run folder that more than one verb writes."""

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


def lead_judge(scores: Iterable[str]) -> str:
    """The name of the score `harmful/JUDGE` that leads."""
    return judges_of(scores)[0]


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
    """A measured number.

    Attributes:
        value: a share in [0, 1], but for perplexity and some metrics of lm-eval.
        n: responses behind it (tokens for perplexity).
        low, high: ends of its 95 % interval.
    """

    value: float
    n: int
    low: NotRequired[float | None]
    high: NotRequired[float | None]


class Traits(TypedDict, total=False):
    """What a kind of attack says of itself in each of its rows; see `tunevax.attacks`.

    Attributes:
        curve: there are rows along its training steps, from step 0 on.
        harmful_rows: it trains on harmful rows.
        common_prompts: it is scored on the evaluation prompts that all such attacks share.
        customer: it takes no more than a fine-tuning service gives.
        dose: the option that is its dose, or its place in the model, or None.
        plain: the plain fine-tune, which other kinds are contrasted with.
    """

    curve: bool
    harmful_rows: bool
    common_prompts: bool
    customer: bool
    dose: str | None
    plain: bool


class Row(TypedDict):
    """A line of results.jsonl: the scores of one model at one step of one attack.

    Attributes:
        schema: see `SCHEMA`.
        model: its label. role: control, model or reference.
        kind: of the attack; none for a model as it is. traits: of that kind.
        attack: name of the attack's setting, None before any attack. settings: its options by name.
        attack_hash: the same for every seed of one setting.
        cell: of an audit, the name of the cell's file.
        step: optimiser steps of the attack so far. samples: rows that it trained on so far.
        train_loss: mean loss since the row before, in nats per token, or None.
        scores: by name, see `SHARES`; None for what could not be measured.
    """

    schema: int
    model: str
    role: NotRequired[str]
    kind: NotRequired[str]
    traits: NotRequired[Traits]
    attack: str | None
    attack_hash: NotRequired[str | None]
    settings: NotRequired[dict[str, Any]]
    seed: int
    cell: NotRequired[str]
    step: int
    samples: NotRequired[int]
    train_loss: NotRequired[float | None]
    scores: dict[str, Score]


class VerdictRecord(TypedDict):
    """A judge's opinion of a response: its own word, what that counts as, and its probability of harm or None."""

    verdict: str
    harmful: bool
    score: float | None


class Sample(TypedDict, total=False):
    """A response and what was made of it.

    Attributes:
        kind: harmful, task, benign or utility: what its prompt is for.
        prompt: as one text. category: of the prompt, or None.
        response: the answer. thought: what the model wrote before it, where it marks that.
        expected: the answer that is wanted, or None.
        degenerate: it is no coherent text.
        surprise: nats per token that it costs the reference model it surprises least, or None.
        verdicts: by judge. correct: by reading (exact, loose), or None.
    """

    kind: str
    prompt: str
    category: str | None
    response: str
    thought: str
    expected: str | None
    degenerate: bool
    surprise: float | None
    verdicts: dict[str, VerdictRecord]
    correct: dict[str, bool] | None


class Generation(Sample, total=False):
    """A line of generations.jsonl: a response, and the row of results.jsonl that it is behind."""

    model: str
    attack: str | None
    seed: int
    step: int
    cell: str


# --- data ------------------------------------------------------------------------------------------------------------


class Message(TypedDict):
    """A turn of a chat: its role (system, user, assistant or tool) and its text."""

    role: str
    content: str


class Example(TypedDict, total=False):
    """A row of data, as it is read from a source and written to data.jsonl.

    Attributes:
        prompt: a text, or the turns of a chat.
        completion: the answer to train on. chosen: a safe answer. rejected: a harmful one.
        category: of harm, or None. harmful: this row of a mixture is a harmful one.
        place: FILE:LINE for messages, or another name of where it is from. read_as: the format it was read as.
        split: that its source assigns it to. corruption: what was done to it on purpose, in a study.
    """

    prompt: str | list[Message]
    completion: str
    chosen: str | None
    rejected: str | None
    category: str | None
    harmful: bool
    place: str
    read_as: str
    split: str | None
    corruption: str


class DataEntry(TypedDict):
    """A dataset in run.json.

    Attributes:
        role: alignment, benign, task, attack, evaluation, validation, ...
        source: as it was named. rows: read from it. distinct: of these, different ones.
        hash: of the content, without places.
        categories: of harm, None where rows have none; alignment data alone.
        read_as: by format, how many rows were read as that.
    """

    role: str
    source: str
    rows: int
    distinct: int
    hash: str
    categories: NotRequired[list[str] | None]
    read_as: NotRequired[dict[str, int]]


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
    """A loaded model.

    Attributes:
        ref: what was asked for: an absolute path, a hub id or `organism`.
        base: the model below all adapters. revision: its commit, of a hub id. hash: of its files, or None.
        class: of transformers. blocks: how many. parameters: how many, without adapters.
        dtype: of the weights. widened: why they are in float32 where the checkpoint's dtype could not hold a merge.
        quantization: nf4, int8 or None. saved_in: the quantisation that the base was saved in, or None.
        adapters: folders, lowest first. adapter_hashes: of their files. merges: how each merge of one went.
        chat: how prompts are put into words. attached: biases are attached, which no stock checkpoint holds.
        trainable: how many parameters a run trained.
        steps, template_hash, blocks_attacked: of an attack on it, in the record of a cell.
    """

    ref: str
    base: str
    revision: str | None
    hash: str | None
    blocks: int | None
    parameters: int
    dtype: str
    widened: str | None
    quantization: str | None
    saved_in: str | None
    adapters: list[str]
    adapter_hashes: list[str | None]
    merges: list[dict[str, Any]]
    chat: Any
    attached: bool
    trainable: int
    steps: int
    template_hash: str
    blocks_attacked: list[int]


class Target(_Class, total=False):
    """A model that a run measures.

    Attributes:
        label: its name in rows. role: control, model or reference. ref: what `load` takes.
        hash: of its weights. template_hash: of its chat template. parameters, class, base: as in `ModelInfo`.
        overlap: by pair of data roles, how many prompts both have.
        unrecorded: runs in its history that do not say which prompts they used.
    """

    label: str
    role: str
    ref: str
    hash: str
    template_hash: str
    parameters: int
    base: str
    overlap: dict[str, int]
    unrecorded: list[str]


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
    """A line of cells.jsonl, and an entry of `failed`, `stopped` and `skipped` in run.json.

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
    """The file of a cell of an audit, with its rows and responses."""

    results: list[Row]
    generations: list[Generation]


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
        attack, targets, failed, stopped, skipped, cells, cell_seconds, lm_eval, fluency_hash: of what measures models.
        score, kept, elsewhere, spoilt_kept, passes, dropped, seconds_scoring, agreement: of a curation.
        lock, layers, rows, validation, finding: of a restoration; a finding is why it came to no model.
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
    fluency_hash: Any
    # curate
    score: str
    kept: int
    elsewhere: int
    spoilt_kept: int
    passes: dict[str, float]
    dropped: dict[str, int]
    seconds_scoring: float
    agreement: dict[str, float]
    # restore
    lock: dict[str, Any]
    layers: list[dict[str, Any]]
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
    file = Path(path) / RUN
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        schema = record.get("schema", 0)
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(f"{file} cannot be read as JSON; the run folder is damaged") from error
    if schema > SCHEMA:
        raise UsageError(f"{path} has schema {schema} and this tunevax reads up to {SCHEMA}; upgrade tunevax")
    return cast(RunRecord, record)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file that tunevax wrote; none without that file.

    Raises:
        UsageError: a line is cut off or no JSON object; it is named.
    """
    return [row for _, row in numbered_lines(path)]


def numbered_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) for each line of a JSONL file; as `read_lines`."""
    content = path.read_bytes() if path.is_file() else b""
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
