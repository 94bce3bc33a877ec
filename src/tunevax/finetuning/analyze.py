"""`tunevax analyze sink`: the sink divergence of every head of one or two models (arXiv 2602.05228).

The paper's observation is that heads with d_h > 0 (see `tunevax.finetuning.surgery`) are the ones that learn harmful
patterns, and that their number grows as a model becomes harmful. Both sides of that are measured here: the map of d_h,
and, where asked for, the harmful score.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tunevax.console import bar
from tunevax.data.contamination import Exclusion, check
from tunevax.data.encoding import answer_span, collate, context_of, encode
from tunevax.data.roles import load_rows
from tunevax.data.splits import drawn
from tunevax.environment import require_one_process
from tunevax.errors import UsageError, require, require_one_of
from tunevax.finetuning.surgery import QUERIES, QUERIES_HELP, common_queries, divergence
from tunevax.lineage import Lineage
from tunevax.mixins import ModelsOptions, Overlap, RunOptions, option, require_given
from tunevax.modeling.attention import WAYS, sink_columns
from tunevax.modeling.loading import load
from tunevax.records import DROPPED, SCHEMA, SINK, Example, RunRecord, Target, data_entry, digest
from tunevax.runs import writing
from tunevax.scoring.evaluate import evaluate
from tunevax.scoring.suite import SuiteOptions, build_suite, labels_of


@dataclass
class SinkOptions(ModelsOptions, Overlap, RunOptions):
    """What `tunevax analyze sink` takes: one model, or two, before and after."""

    safety_data: str | None = option(
        None, "prompt, chosen, rejected: file, hub id, organism, or proxy:TOPIC; the evaluation split"
    )
    output_dir: str | None = option(None, "the run folder to write")
    pairs: int = option(100, "at most so many pairs of answers, drawn by prompt hash")
    batch_size: int = option(8, "pairs in a forward pass")
    max_length: int = option(512, "tokens per text; longer answers are cut")
    sink_attention: str = option("linear", "linear or eager; see tunevax finetune surgery")
    sink_position: int = option(0, "position of the token that attention sinks into")
    sink_queries: str = option("common", QUERIES_HELP)
    harmful_score: bool = option(False, "generate answers and judge them too")

    def __post_init__(self) -> None:
        require(self, "pairs", "batch_size", at_least=1)
        require(self, "sink_position", at_least=0)
        require_one_of(self, sink_attention=WAYS, sink_queries=QUERIES)


def analyze_sink(options: SinkOptions, command: str = "", suite_options: SuiteOptions | None = None) -> Path:
    """Measure, write a run folder with sink.json, and return it.

    sink.json: `pairs`, `sink_position`, `sink_queries`, and `models`, for each `label`, `ref`, `d` ([layers][heads],
    mean over pairs), `positive_heads`, `heads`, `R` (the mean of ReLU(d)) and `scores` (of `evaluate`, or None).

    Args:
        suite_options: what to score on with `options.harmful_score`; default the evaluation split of the safety data.

    Raises:
        UsageError: anything that cannot be loaded or read; prompts that a model was trained on.
    """
    require_given(options, "model", "safety_data", "output_dir")
    if len(options.model) > 2:
        raise UsageError(f"analyze sink takes one model or two, before and after, and there are {len(options.model)}")
    require_one_process("analyzing")
    exclusion = Exclusion.of([Lineage.of(ref).prompts for ref in options.model], options.drop_overlap)
    source = str(options.safety_data)
    rows = load_rows("evaluation", source, ("chosen", "rejected"), "analyze sink")
    pairs = drawn(exclusion.score("evaluation", rows), options.pairs)
    suite = None
    if options.harmful_score:
        suite = build_suite(suite_options or SuiteOptions(), options.safety_data, exclusion=exclusion.fresh())
    asked = {**(suite.roles() if suite else {}), "evaluation": [*pairs, *(suite.harmful if suite else [])]}
    overlaps: list[Any] = [check(ref, asked, allow=options.allow_overlap) for ref in options.model]
    config = {k: v for k, v in vars(options).items() if k not in ("output_dir", "overwrite")}
    record: RunRecord = {
        "verb": "analyze", "method": "sink", "paper": "arXiv 2602.05228", "command": command, "seed": 0, "parent": None,
        "config": {**config, **({"suite": vars(suite_options)} if suite_options else {})},
        "data": [data_entry("evaluation", source, pairs)], "overlap_dropped": cast(Any, exclusion.summary()),
    }  # fmt: skip
    models: list[dict[str, Any]] = []
    targets: list[Target] = []
    with writing(str(options.output_dir), record, overwrite=options.overwrite) as run:
        if exclusion.dropped:
            run.write_lines(DROPPED, exclusion.dropped)
        for ref, label, overlap in zip(options.model, labels_of(options.model), overlaps, strict=True):
            loaded = load(ref, revision=options.revision, dtype=options.dtype, chat_template=options.chat_template)
            d = sink_map(
                loaded.model, loaded.tokenizer, pairs, options.batch_size, options.max_length,
                options.sink_attention, options.sink_position, options.sink_queries,
            )  # fmt: skip
            scores = evaluate(loaded.model, loaded.tokenizer, suite)[0] if suite else None
            name, template = loaded.info["ref"], digest(loaded.tokenizer.chat_template)
            models.append({"label": label, "ref": name, **summary(d), "scores": scores})
            targets.append({"label": label, "role": "model", "ref": name, **overlap, "template_hash": template})
            record["model"] = record.get("model") or loaded.info
        record["targets"] = targets
        read = {"sink_position": options.sink_position, "sink_queries": options.sink_queries}
        written = {"schema": SCHEMA, "pairs": len(pairs), **read, "models": models}
        (run.path / SINK).write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    return run.final


def sink_map(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Example], batch_size: int = 8,
    max_length: int = 512, how: str = "linear", sink: int = 0, queries: str = "common",
) -> torch.Tensor:  # fmt: skip
    """d [layers, heads] on the CPU: the sink divergence, the mean over `pairs` with `prompt`, `chosen`, `rejected`.

    `queries` are those of `tunevax.finetuning.surgery`: `common`, in which a pair whose answers have no token in common
    places counts as 0, or `all`. The model is put in eval mode and left in it.

    Raises:
        UsageError: as `encode` and `sink_columns`.
    """
    context, device = context_of(model), next(model.parameters()).device
    answers = [encode(pairs, tokenizer, max_length, context=context, answer=name) for name in ("rejected", "chosen")]
    spans = [[answer_span(row, tokenizer) for row in rows] for rows in answers]
    model.eval()
    total = torch.zeros((), dtype=torch.float64)
    with torch.no_grad(), bar() as progress:
        task = progress.add_task("sink attention", total=len(pairs), note="")
        for first in range(0, len(pairs), batch_size):
            part = slice(first, first + batch_size)
            rows = [row for rows in answers for row in rows[part]]
            inputs = {k: v.to(device) for k, v in collate(rows, tokenizer.pad_token_id).items()}
            tokens = inputs["input_ids"].shape[1]
            counted = common_queries(spans[0][part], spans[1][part], tokens) if queries == "common" else None
            with sink_columns(model, inputs, how, sink, counted) as values:
                total = total + divergence(values).cpu().double() * (len(rows) // 2)
            progress.update(task, advance=len(rows) // 2)
    return (total / len(pairs)).float()


def summary(d: torch.Tensor) -> dict[str, Any]:
    """d [layers, heads] as JSON values, with what is counted on it."""
    rounded = [[round(value, 8) for value in layer] for layer in d.tolist()]
    positive = int((d > 0).sum())
    return {"d": rounded, "positive_heads": positive, "heads": d.numel(), "R": float(torch.relu(d).mean())}
