"""`tunevax score`: evaluate models as they are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from tunevax.data.contamination import Exclusion, check
from tunevax.errors import UsageError
from tunevax.lineage import Lineage
from tunevax.mixins import ModelsOptions, Overlap, RunOptions, option, require_given
from tunevax.records import DROPPED, GENERATIONS, RESULTS, SCHEMA, RunRecord, Target, data_entry, digest
from tunevax.runs import writing
from tunevax.scoring import vllm_engine
from tunevax.scoring.evaluate import evaluate
from tunevax.scoring.suite import SuiteOptions, build_suite, labels_of


@dataclass
class ScoreOptions(SuiteOptions, ModelsOptions, Overlap, RunOptions):
    """Options of `tunevax score`."""

    safety_data: str | None = option(None, "its evaluation split is scored")
    task_data: str | None = option(None, "its evaluation split measures accuracy")
    output_dir: str | None = option(None, "the run folder to write")


def score(options: ScoreOptions, command: str = "") -> Path:
    """Score models as they are and write a run folder: one row per model in results.jsonl, every response in
    generations.jsonl. Raises `UsageError` for anything that cannot be loaded, or prompts to score on that a model was
    trained on."""
    from tunevax.environment import require_one_process
    from tunevax.modeling.loading import load

    require_given(options, "model", "output_dir")
    models = options.model
    require_one_process("scoring")
    exclusion = Exclusion.of([Lineage.of(ref).prompts for ref in models], options.drop_overlap)
    suite = build_suite(options, options.safety_data, options.task_data, weights_change=False, exclusion=exclusion)
    overlaps = [check(ref, suite.roles(), allow=options.allow_overlap) for ref in models]
    record: RunRecord = {
        "verb": "score", "method": None, "command": command, "seed": 0, "parent": None,
        "config": {k: v for k, v in vars(options).items() if k not in ("output_dir", "overwrite")},
        "data": [data_entry("evaluation", options.eval_data or options.safety_data or "", suite.harmful)],
        "overlap_dropped": exclusion.summary(), "targets": [],
    }  # fmt: skip
    results, generations = [], []
    with writing(str(options.output_dir), record, overwrite=options.overwrite) as run:
        if exclusion.dropped:
            run.write_lines(DROPPED, exclusion.dropped)
        for ref, label, overlap in zip(models, labels_of(models), overlaps, strict=True):
            how: dict[str, Any] = {"dtype": options.dtype}
            if suite.engine == "vllm":
                how = vllm_engine.loading(ref, options.revision, options.dtype)
            loaded = load(ref, revision=options.revision, chat_template=options.chat_template, **how)
            if suite.engine == "vllm" and loaded.info["attached"]:
                why = "which vLLM does not support; score it without --engine"
                raise UsageError(f"{ref} has biases attached (a safety lock), {why}")
            scores, samples = evaluate(loaded.model, loaded.tokenizer, suite, full=True)
            key = {"model": label, "attack": None, "seed": 0, "step": 0}
            more = {"role": "model", "attack_hash": None, "samples": 0, "train_loss": None, "scores": scores}
            results.append({"schema": SCHEMA, **key, **more})
            generations += [{**key, **sample} for sample in samples]
            template = digest(loaded.tokenizer.chat_template)
            target = {"label": label, "role": "model", "ref": loaded.info["ref"], **overlap, "template_hash": template}
            record["targets"].append(cast(Target, target))
            record["model"] = record.get("model") or loaded.info
        if suite.harness:
            record["lm_eval"] = suite.harness.versions
        run.write_lines(RESULTS, results)
        run.write_lines(GENERATIONS, generations)
    return run.final
