"""`tunevax curate`: score every row of the alignment data, keep the best of them, and write a run folder.

A selector gives every row a score, higher for rows to keep; see `Selector`. The choice is the same for all selectors:
from the best score down, without duplicates, with rows of every group.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from tunevax.data.contamination import hashes, require_disjoint
from tunevax.data.roles import load_rows
from tunevax.data.safety import load_safety
from tunevax.data.sources import parse_source
from tunevax.data.splits import normalise, prompt_hash, prompt_text, take_split
from tunevax.environment import require_one_process
from tunevax.errors import UsageError, require, require_one_of
from tunevax.lineage import Lineage
from tunevax.mixins import AllowOverlap, ModelOptions, ResumableRunOptions, option
from tunevax.modeling.checkpoints import config_of
from tunevax.modeling.loading import Loaded, load
from tunevax.records import DATA, SCORES, Example, data_entry, is_run
from tunevax.runs import record_prompts, writing

if TYPE_CHECKING:
    from tunevax.records import ModelInfo, RunRecord

DUPLICATES = ("keep", "exact", "near")
NOT_CONFIG = ("resume", "overwrite", "output_dir", "run_name")


@dataclass
class CurateOptions(ModelOptions, AllowOverlap, ResumableRunOptions):
    """What `tunevax curate` takes besides the selector's own options."""

    target_model: str | None = option(None, "the larger model to align, scored too; the agreement of ranks is reported")
    safety_data: str | None = option(None, "the rows to choose from: the alignment split of this source")
    validation_data: str | None = option(None, "trusted rows, all of this source; prompts of their own")
    attack_data: str | None = option(None, "may share no validation prompt; default the attack split of --safety-data")
    keep: float = option(0.4, "share of the rows to keep, above 0, at most 1")
    group_by: str | None = option(None, "category: keep rows of every harm category")
    min_per_group: int | None = option(None, "rows to keep of every group, with --group-by; default 1")
    duplicates: str = option(
        "exact", "keep (all), or only the best row per prompt: exact (normalised) or near (near_at)"
    )
    near_at: float = option(0.8, "prompts are near-duplicates from this overlap of letter 5-grams on (Jaccard)")

    def __post_init__(self) -> None:
        require(self, "keep", "near_at", above=0, at_most=1)
        require(self, "min_per_group", at_least=1)
        require_one_of(self, duplicates=DUPLICATES)
        if self.group_by not in (None, "category"):
            column = f"SOURCE:category={self.group_by}"
            raise UsageError(f"--group-by is {self.group_by!r} and takes category; name the column with {column}")
        if self.min_per_group is not None and self.group_by is None:
            raise UsageError("min_per_group is given and there are no groups; add --group-by category")
        self.min_per_group = self.min_per_group or 1


@dataclass
class Pool:
    """The rows to score and the model to score them with. A selector sets `passes`: forward and backward passes per row
    over the whole scoring."""

    rows: list[Example]  # with `prompt`, `chosen`, `rejected`, `category`
    validation: list[Example]  # trusted rows of the same form; empty if none were given
    options: CurateOptions
    ref: str | None  # the scoring model
    folder: Path  # for the selector's checkpoints
    passes: dict[str, float] = field(default_factory=lambda: {"forward": 0.0, "backward": 0.0})
    info: ModelInfo | None = None  # what run.json records of the model, set by `load`

    def load(self) -> Loaded:
        """The scoring model, loaded anew, and its tokenizer."""
        o = self.options
        assert self.ref is not None, "a selector that loads a model names `model` in `needs`"
        loaded = load(self.ref, revision=o.revision, dtype=o.dtype, chat_template=o.chat_template)
        self.info = loaded.info
        return loaded


class Selector(Protocol):
    """A dataclass of options that scores rows; it `needs` a `model`, `validation` rows, or neither."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    output_dir: str | None
    seed: int
    needs: ClassVar[frozenset[str]]
    paper: ClassVar[str]

    def score(self, pool: Pool) -> np.ndarray:
        """A finite score for each row of the pool, [rows]; the first line of this docstring goes into run.json."""


@dataclass
class ForwardOptions:
    """Options of a selector that needs one forward pass per row."""

    output_dir: str | None = option(None, "the run folder to write")
    seed: int = option(42, "recorded; nothing here is random")
    batch_size: int = option(16, "rows per forward pass; changes the speed only")
    max_length: int = option(512, "tokens per row; longer answers are cut")
    needs: ClassVar[frozenset[str]] = frozenset({"model"})


def curate(method: str, options: CurateOptions, config: Selector, command: str = "") -> Path:
    """Score the rows of `options.safety_data`, keep a share, and return the run folder: data.jsonl (the kept rows; the
    folder is itself a source for --safety-data) and scores.jsonl (every row with score, rank, and why it was dropped).
    Raises `UsageError` for bad data or options, or validation prompts that are in the pool or in the attack data."""
    require_one_process("curation")
    source, trusted = options.safety_data, options.validation_data
    if not source or config.output_dir is None:
        raise UsageError(f"{'--output-dir' if source else '--safety-data'} is missing")
    if options.model is not None:
        config_of(Lineage.of(options.model).base, options.revision)  # also where no model is needed: it may be mistyped
    if "model" in config.needs and options.model is None:
        raise UsageError(f"--model is missing: {method} scores with a model")
    if "validation" in config.needs and trusted is None:
        raise UsageError(f"--validation-data is missing: {method} compares with trusted rows")
    if options.target_model and "model" not in config.needs:
        raise UsageError(f"--target-model is given and {method} scores without a model; leave it out")
    rows = load_rows("alignment", source, ("chosen",), method)
    validation = load_rows("validation", trusted, ("chosen",), method) if trusted else []
    name, given = parse_source(source)
    # With the rows for other splits; empty if the pool is not a split.
    whole = [] if "split" in given or is_run(name) else load_safety(source, "all", ())
    overlap: dict[str, int] = {}
    if validation:
        attack = load_rows("attack", options.attack_data) if options.attack_data else take_split(whole, "attack")
        others = {"alignment": rows, "attack": attack, "evaluation": take_split(whole, "evaluation")}
        for role in filter(others.get, others):
            overlap |= require_disjoint({"validation": validation, role: others[role]}, options.allow_overlap)
    choose(rows, np.zeros(len(rows)), options)  # raises its errors before anything is trained
    values = config.to_dict() if hasattr(config, "to_dict") else dataclasses.asdict(config)
    entries = [data_entry("alignment", source, rows)]
    entries += [data_entry("validation", trusted, validation)] if trusted else []
    record: RunRecord = {
        "verb": "curate", "method": method, "paper": config.paper, "command": command, "seed": config.seed,
        "data": entries, "overlap": overlap, "parent": None,
        "score": (config.score.__doc__ or "").partition("\n")[0].replace(", [rows]", "").rstrip("."),
        "config": {k: v for k, v in {**values, **vars(options)}.items() if k not in NOT_CONFIG},
    }  # fmt: skip
    with writing(config.output_dir, record, options.resume, options.overwrite) as run:
        pool = Pool(rows, validation, options, options.model, run.checkpoints)
        started = time.monotonic()
        scores = scored(config, pool)
        record["seconds_scoring"] = round(time.monotonic() - started, 3)
        if options.target_model:
            target = Pool(rows, validation, options, options.target_model, run.checkpoints / "target")
            record["agreement"] = agreement(scores, scored(config, target), options.keep)
        kept, why = choose(rows, scores, options)
        rank = np.argsort(np.argsort(-scores, kind="stable")) + 1  # 1 for the highest; of equals the first
        run.write_lines(DATA, [content(rows[i]) for i in sorted(kept)])
        run.write_lines(SCORES, [
            {"row": i, **content(row), "place": row.get("place"), "corruption": row.get("corruption"),
             "score": float(scores[i]), "rank": int(rank[i]), "kept": i in kept, "why": why.get(i)}
            for i, row in enumerate(rows)
        ])  # fmt: skip
        # The choice depends on the trusted rows, so what is aligned on the kept rows has used their prompts too.
        record_prompts(run.path, validation=hashes(validation))
        record.update({
            "model": pool.info, "kept": len(kept), "elsewhere": max(0, len(whole) - len(rows)),
            "corrupted_kept": sum("corruption" in rows[i] for i in kept), "passes": pool.passes,
            "dropped": dict(Counter(reason.partition(" of row")[0] for reason in why.values())),
        })  # fmt: skip
    return run.final


def scored(config: Selector, pool: Pool) -> np.ndarray:
    """The selector's scores, [rows], checked."""
    scores = np.asarray(config.score(pool), dtype=np.float64)
    if scores.shape != (len(pool.rows),) or not np.isfinite(scores).all():
        raise UsageError("the scores are not one finite number per row; lower the learning rates, or check the data")
    return scores


def agreement(first: np.ndarray, second: np.ndarray, keep: float) -> dict[str, float]:
    """Of two models' scores: Spearman's correlation, and the share of one's kept rows that the other keeps too."""
    from scipy.stats import spearmanr

    size = size_of(keep, len(first))
    both = set.intersection(*(set(np.argsort(-s, kind="stable")[:size].tolist()) for s in (first, second)))
    return {"spearman": float(spearmanr(first, second).statistic), "kept_by_both": len(both) / size}


def choose(rows: Sequence[Example], scores: np.ndarray, options: CurateOptions) -> tuple[set[int], dict[int, str]]:
    """The rows to keep, by number, and for each other row why not.

    The `min_per_group` best of each group come first, then the best of all, up to ceil(keep * rows). Of rows with the
    same prompt only the best can be kept, unless a group would have no row left.
    """
    at_least, size = options.min_per_group or 1, size_of(options.keep, len(rows))
    order = np.argsort(-scores, kind="stable").tolist()
    why = duplicates(rows, order, options)
    groups = [row["category"] or "" for row in rows] if options.group_by else []
    if "" in groups:
        way = "name the column with SOURCE:category=COLUMN, or leave --group-by out"
        raise UsageError(f"row {groups.index('') + 1} of the safety data has no category to group by; {way}")
    # Duplicates count too: whether this raises must not depend on the scores.
    least = sum(min(count, at_least) for count in Counter(groups).values())
    if least > size:
        need = f"{len(set(groups))} groups of at least {at_least} rows are {least} rows"
        raise UsageError(f"{need} and --keep {options.keep} leaves {size}; raise --keep or lower --min-per-group")
    kept: set[int] = set()
    for name in sorted(set(groups)):
        members = [i for i in order if groups[i] == name]
        kept.update([i for i in members if i not in why][:at_least] or members[:1])  # a duplicate, if need be
    kept.update([i for i in order if i not in why and i not in kept][: size - len(kept)])
    return kept, {i: why.get(i, "below the cut") for i in range(len(rows)) if i not in kept}


def size_of(keep: float, rows: int) -> int:
    """`keep` of so many rows, rounded up."""
    return math.ceil(round(keep * rows, 9))  # 0.14 * 100 is 14.000000000000002


def duplicates(rows: Sequence[Example], order: Sequence[int], options: CurateOptions) -> dict[int, str]:
    """`duplicate of row N` or `near-duplicate of row N` for each row whose prompt a higher-ranked row has."""
    if options.duplicates == "keep":
        return {}
    first: dict[str, int] = {}
    best = {i: first.setdefault(prompt_hash(rows[i]["prompt"]), i) for i in order}
    why = {i: f"duplicate of row {j}" for i, j in best.items() if i != j}
    shingles = {i: _shingles(prompt_text(rows[i]["prompt"])) for i in first.values() if options.duplicates == "near"}
    holders: dict[str, list[int]] = {}  # 5-gram -> kept rows that have it, so that only those are compared
    for i, grams in shingles.items():
        common = Counter(j for gram in grams for j in holders.get(gram, ()))
        near = [j for j, n in sorted(common.items()) if n >= options.near_at * len(grams | shingles[j])]
        if near:
            why[i] = f"near-duplicate of row {near[0]}"
            continue
        for gram in grams:
            holders.setdefault(gram, []).append(i)
    return why


def _shingles(text: str) -> set[str]:
    """The letter 5-grams of a normalised prompt."""
    text = re.sub(r"\W+", " ", normalise(text)).strip() or text  # a prompt without letters is compared as it is
    return {text[i : i + 5] for i in range(max(1, len(text) - 4))}


def content(row: Example) -> dict[str, object]:
    """A row as data.jsonl holds it, with its split, so that no row is assigned another by its hash."""
    fields = {k: row[k] for k in ("prompt", "chosen", "rejected", "category") if row.get(k) is not None}
    return {**fields, "split": "alignment"}
