"""`tunevax curate`: score every row of the alignment data, keep the best of them, and write a run folder.

A selector is a dataclass of options with `needs`, `paper` and a method `score(pool)` that gives every row a number,
higher for what to keep. The choice itself is the same for all of them: down the ranking, past duplicates, with every
group alive.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from tunevax.data.contamination import hashes, require_disjoint
from tunevax.data.roles import load_rows
from tunevax.data.safety import load_safety
from tunevax.data.sources import parse_source
from tunevax.data.splits import normalise, prompt_hash, prompt_text, take_split
from tunevax.environment import require_one_process
from tunevax.errors import UsageError, require, require_one_of
from tunevax.lineage import Lineage
from tunevax.mixins import AllowOverlap, ModelOptions, ResumableRunOptions, option, require_given
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

    target_model: str | None = option(
        None, "the larger model that will be aligned: scored too, and the agreement of ranks reported"
    )
    safety_data: str | None = option(None, "the rows to choose from, their alignment split")
    validation_data: str | None = option(None, "trusted rows of right behaviour, all of the file; prompts of their own")
    attack_data: str | None = option(
        None, "no validation prompt may occur here; default the attack split of --safety-data"
    )
    keep: float = option(0.4, "share of the rows to keep, above 0, at most 1")
    group_by: str | None = option(None, "category: keep rows of every harm category")
    min_per_group: int | None = option(None, "rows to keep of every group, with --group-by; default 1")
    duplicates: str = option(
        "exact", "keep all, or only the best row of a prompt: exact (normalised) or near (see near_at)"
    )
    near_at: float = option(0.8, "prompts are near-duplicates from this overlap of letter 5-grams on (Jaccard)")

    def __post_init__(self) -> None:
        require(self, "keep", above=0, at_most=1)
        if self.group_by not in (None, "category"):
            raise UsageError(
                f"--group-by is {self.group_by!r} and takes category; with SOURCE:category={self.group_by} that is it"
            )
        if self.min_per_group is not None and self.group_by is None:
            raise UsageError("min_per_group is given and there are no groups; add --group-by category")
        self.min_per_group = 1 if self.min_per_group is None else self.min_per_group
        require(self, "min_per_group", at_least=1)
        require_one_of(self, duplicates=DUPLICATES)
        require(self, "near_at", above=0, at_most=1)


@dataclass
class Pool:
    """What a selector works with.

    Attributes:
        rows: the rows to score, with `prompt`, `chosen`, `rejected`, `category`.
        validation: trusted rows of the same form; empty if none were given.
        options: how to load the model.
        ref: the model that scores, or None.
        folder: where a selector may keep checkpoints.
        passes: forward and backward passes per row, over the whole scoring, filled in by the selector.
    """

    rows: list[Example]
    validation: list[Example]
    options: CurateOptions
    ref: str | None
    folder: Path
    passes: dict[str, float] = field(default_factory=lambda: {"forward": 0.0, "backward": 0.0})
    info: ModelInfo | None = None

    @property
    def resume(self) -> bool:
        """Whether to go on from what is in `folder`."""
        return self.options.resume

    def load(self, **how: Any) -> Loaded:
        """The scoring model, fresh; what run.json says of it is noted."""
        o = self.options
        loaded = load(self.ref, revision=o.revision, dtype=o.dtype, chat_template=o.chat_template, **how)
        self.info = cast("ModelInfo", loaded.info)
        return loaded


def curate(method: str, options: CurateOptions, config: Any, command: str = "") -> Path:
    """Score the rows of `options.safety_data`, keep a share, and return the run folder.

    The folder holds data.jsonl (the kept rows, a safety dataset that any verb's --safety-data accepts, as does the
    folder itself) and scores.jsonl (every row of the pool with score, rank, and why it was dropped).

    Raises:
        UsageError: bad data or options; validation prompts that are in the pool or in the attack data.
    """
    require_one_process("curation")
    require_given(options, "safety_data")
    if options.model is not None:
        config_of(Lineage.of(options.model).base, options.revision)  # a typing error, also where no model is needed
    if "model" in config.needs and options.model is None:
        raise UsageError(f"--model is missing: {method} scores with a model")
    if "validation" in config.needs and options.validation_data is None:
        raise UsageError(f"--validation-data is missing: {method} compares with trusted rows")
    if options.target_model and "model" not in config.needs:
        raise UsageError(f"--target-model is given and {method} scores without a model; leave it out")
    rows = load_rows("alignment", options.safety_data, ("chosen",), method)
    validation = (
        load_rows("validation", options.validation_data, ("chosen",), method) if options.validation_data else []
    )
    whole = beside(options)
    overlap = check_overlap(options, rows, whole, validation)
    choose(rows, np.zeros(len(rows)), options)  # what it refuses shall be refused before anything is trained
    values = config.to_dict() if hasattr(config, "to_dict") else dataclasses.asdict(config)
    entries = [data_entry("alignment", options.safety_data, rows)]
    if validation:
        entries.append(data_entry("validation", options.validation_data, validation))
    record: RunRecord = {
        "verb": "curate", "method": method, "paper": config.paper, "command": command, "seed": config.seed,
        "data": entries, "overlap": overlap, "parent": None, "score": meaning(config),
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
        rank = ranks(scores)
        run.write_lines(DATA, [content(rows[i]) for i in sorted(kept)])
        run.write_lines(
            SCORES,
            [
                {"row": i, **content(row), "place": row.get("place"), "corruption": row.get("corruption"),
                 "score": float(scores[i]), "rank": int(rank[i]), "kept": i in kept, "why": why.get(i)}
                for i, row in enumerate(rows)
            ],
        )  # fmt: skip
        # What was aligned on these rows has learnt from the trusted ones, too.
        record_prompts(run.path, validation=hashes(validation))
        record.update(
            {
                "model": pool.info, "kept": len(kept), "elsewhere": max(0, len(whole) - len(rows)),
                "spoilt_kept": sum("corruption" in rows[i] for i in kept), "passes": pool.passes,
                "dropped": dict(Counter(reason.partition(" of row")[0] for reason in why.values())),
            }
        )  # fmt: skip
    return run.final


def meaning(config: Any) -> str:
    """What a selector's score is: the first line of what it says of `score`."""
    return (config.score.__doc__ or "").partition("\n")[0].replace(", [rows]", "").rstrip(".")


def check_overlap(
    options: CurateOptions, rows: Sequence[Example], whole: list[Example], validation: Sequence[Example]
) -> dict[str, int]:
    """Prompts that validation shares with the pool, the attack or the evaluation data (of `whole`, see `beside`); a
    UsageError unless that is allowed. A role without rows is not in the result."""
    if not validation:
        return {}
    others = {"alignment": rows}
    if options.attack_data:
        others["attack"] = load_rows("attack", options.attack_data)
    for split in ("attack", "evaluation"):
        others.setdefault(split, take_split(whole, split))
    found: dict[str, int] = {}
    for role, theirs in others.items():
        if theirs:
            found |= require_disjoint({"validation": validation, role: theirs}, options.allow_overlap)
    return found


def beside(options: CurateOptions) -> list[Example]:
    """All rows of the source the pool is a split of; none if it is no split, or has nothing else."""
    name, given = parse_source(options.safety_data)
    return [] if "split" in given or is_run(name) else load_safety(options.safety_data, "all", ())


def scored(config: Any, pool: Pool) -> np.ndarray:
    """The selector's scores, [rows], checked."""
    scores = np.asarray(config.score(pool), dtype=np.float64)
    if scores.shape != (len(pool.rows),) or not np.isfinite(scores).all():
        raise UsageError("the scores are not one finite number per row; lower the learning rates, or check the data")
    return scores


def ranks(scores: np.ndarray) -> np.ndarray:
    """1 for the highest score; the first of equals is higher."""
    order = np.argsort(-scores, kind="stable")
    found = np.empty(len(scores), dtype=int)
    found[order] = np.arange(1, len(scores) + 1)
    return found


def agreement(first: np.ndarray, second: np.ndarray, keep: float) -> dict[str, float]:
    """Of two models' scores: Spearman's correlation, and the share of the rows kept by one that both keep."""
    from scipy.stats import spearmanr

    size = size_of(keep, len(first))
    tops = [set(np.argsort(-s, kind="stable")[:size].tolist()) for s in (first, second)]
    return {"spearman": float(spearmanr(first, second).statistic), "kept_by_both": len(tops[0] & tops[1]) / size}


def choose(rows: Sequence[Example], scores: np.ndarray, options: CurateOptions) -> tuple[set[int], dict[int, str]]:
    """The rows to keep, by number, and for each other row why not.

    The `min_per_group` best of each group come first, then the best of all, up to ceil(keep * rows). Of several rows
    with one prompt the best alone can be kept, unless a group would have no row left.

    Raises:
        UsageError: the groups ask for more rows than are kept.
    """
    order = np.argsort(-scores, kind="stable").tolist()
    size = size_of(options.keep, len(rows))
    why = duplicates(rows, order, options)
    groups = groups_of(rows, options)
    # By all rows of a group, duplicates too, so that no order of the rows can break what one order fulfils.
    least = sum(min(count, options.min_per_group) for count in Counter(groups).values())
    if least > size:
        raise UsageError(
            f"{len(set(groups))} groups of at least {options.min_per_group} rows are {least} rows and --keep "
            f"{options.keep} leaves {size}; raise --keep or lower --min-per-group"
        )
    kept: set[int] = set()
    for name in sorted(set(groups)):
        members = [i for i in order if groups[i] == name]
        best = [i for i in members if i not in why][: options.min_per_group] or members[:1]  # a duplicate, if need be
        kept.update(best)
    kept.update([i for i in order if i not in why and i not in kept][: size - len(kept)])
    return kept, {i: why.get(i, "below the cut") for i in range(len(rows)) if i not in kept}


def size_of(keep: float, rows: int) -> int:
    """How many of so many rows a share is, rounded up."""
    return math.ceil(round(keep * rows, 9))  # 0.14 * 100 is 14.000000000000002


def groups_of(rows: Sequence[Example], options: CurateOptions) -> list[str]:
    """The group of each row; empty without --group-by. UsageError if a row has none."""
    if options.group_by is None:
        return []
    for number, row in enumerate(rows, 1):
        if not row["category"]:
            raise UsageError(
                f"row {number} of the safety data has no category to group by; say which column holds it with "
                "SOURCE:category=COLUMN, or leave --group-by out"
            )
    return [row["category"] for row in rows]


def duplicates(rows: Sequence[Example], order: Sequence[int], options: CurateOptions) -> dict[int, str]:
    """For each row whose prompt a higher-ranked one has: `duplicate of row N` or `near-duplicate of row N`."""
    if options.duplicates == "keep":
        return {}
    found: dict[int, str] = {}
    first: dict[str, int] = {}
    for i in order:
        best = first.setdefault(prompt_hash(rows[i]["prompt"]), i)
        if best != i:
            found[i] = f"duplicate of row {best}"
    if options.duplicates == "near":
        shingles = {i: _shingles(prompt_text(rows[i]["prompt"])) for i in first.values()}
        holders: dict[str, list[int]] = {}  # 5-gram -> kept rows that have it, so that only those are compared
        for i in first.values():
            common = Counter(j for gram in shingles[i] for j in holders.get(gram, ()))
            near = next(
                (j for j, n in sorted(common.items()) if n >= options.near_at * len(shingles[i] | shingles[j])), None
            )
            if near is not None:
                found[i] = f"near-duplicate of row {near}"
                continue
            for gram in shingles[i]:
                holders.setdefault(gram, []).append(i)
    return found


def _shingles(text: str) -> set[str]:
    """The letter 5-grams of a normalised prompt."""
    text = re.sub(r"\W+", " ", normalise(text)).strip() or text  # of signs alone, the signs
    return {text[i : i + 5] for i in range(max(1, len(text) - 4))}


def content(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the safety dataset as it is written: with its split, which a hash would put elsewhere."""
    fields = {k: row[k] for k in ("prompt", "chosen", "rejected", "category") if row.get(k) is not None}
    return {**fields, "split": "alignment"}
