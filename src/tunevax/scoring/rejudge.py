"""`tunevax judge`: judge the stored answers of a run again. Nothing is attacked or generated."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from tunevax import records
from tunevax.console import bar
from tunevax.data.sources import contents
from tunevax.data.thoughts import joined
from tunevax.errors import UsageError
from tunevax.mixins import RunOptions, option, require_given
from tunevax.records import Example, Generation, Prompt, Row, is_run, read_generations, read_lines, read_run
from tunevax.runs import writing
from tunevax.scoring.evaluate import judged
from tunevax.scoring.fluency import Reference, Surprise
from tunevax.scoring.judges import Judge, Verdict, load_judges, reads_model
from tunevax.scoring.metrics import load_metrics, measure
from tunevax.scoring.suite import Suite

AGAIN = (records.HARMFUL, records.JUDGED, records.UNPARSABLE, records.UNANSWERED, records.DEGENERATE, records.METRIC)
"""Prefixes of the scores that judging again replaces."""
AS_JUDGED: tuple[Literal["degenerate", "surprise", "verdicts"], ...] = ("degenerate", "surprise", "verdicts")
"""The fields of a response that judging again replaces."""
WRITTEN = ("run.json", "README.md", "report.html", "config.json", records.RESULTS, records.GENERATIONS)
"""The files that are not copied: they are written again, or belong to the original run."""


@dataclass
class JudgeOptions(RunOptions):
    """Options of `tunevax judge`; those left out are as in the run."""

    output_dir: str | None = option(None, "the run folder to write")
    judges: list[str] = option([], "refusal-keywords, organism, hf:MODEL, or of installed packages")
    fluency_model: list[str] = option([], "language models; text that surprises each of them is degenerate; or none")
    metrics: list[str] = option([], "metrics of installed packages")


def rejudge(run: str, options: JudgeOptions, command: str = "") -> Path:
    """Judge the responses of a run of `tunevax score`, `attack` or `audit` again, and write a run folder with new
    judges' scores and metrics. Its run.json (versions, hardware, time) is kept, and `rejudged_from` names it. Raises
    `UsageError` for no such run, no responses in it, or a judge or metric that cannot be loaded or read."""
    require_given(options, "output_dir")
    source = Path(run)
    if not is_run(source):
        raise UsageError(f"{run} is no run folder; name one that `tunevax score`, `attack` or `audit` wrote")
    record, rows = read_run(source), cast(list[Row], read_lines(source / records.RESULTS))
    samples, generations = defaultdict[tuple, list[Generation]](list), list(read_generations(source, rows))
    for sample in generations:
        samples[key(sample)].append(sample)
    if not rows or not all(key(row) in samples for row in rows):
        raise UsageError(f"{run} has no responses, or not those behind every row, so they cannot be judged again")
    named = ("judges", "fluency_model", "metrics")
    new = {name: getattr(options, name) or record["config"].get(name) or [] for name in named}
    new["fluency_model"] = [ref for ref in new["fluency_model"] if ref != "none"]
    metrics = load_metrics(new["metrics"])
    suite = Suite([], load_judges(new["judges"]), fluency=[remembering(ref) for ref in new["fluency_model"]])
    record |= {"command": command, "rejudged_from": str(source.absolute()), "config": {**record["config"], **new}}
    if "scoring" in record:
        record["scoring"] = {**record["scoring"], **{name: contents(value) for name, value in new.items()}}
    with writing(str(options.output_dir), record, overwrite=options.overwrite) as folder, bar() as progress:
        task = progress.add_task("judge", total=len(rows), note="")
        for row in rows:
            behind = samples[key(row)]
            harmful = [sample for sample in behind if sample["kind"] == "harmful"]
            answers = [joined(sample.get("thought"), sample["response"]) for sample in harmful]
            kept = {name: stored(run, name, harmful) for name, judge in suite.judges.items() if reads_model(judge)}
            of_row = suite._replace(harmful=cast(list[Example], harmful), judges={**suite.judges, **kept})
            scores, again = judged(of_row, answers)
            for sample, as_judged in zip(harmful, again, strict=True):
                for name in AS_JUDGED:
                    sample[name] = as_judged[name]
            others = {name: score for name, score in row["scores"].items() if not name.startswith(AGAIN)}
            row["scores"] = {**scores, **others, **measure(metrics, behind)}
            progress.advance(task)
        folder.write_lines(records.RESULTS, rows)
        folder.write_lines(records.GENERATIONS, generations)
        for file in source.iterdir():
            if file.is_file() and file.name not in WRITTEN:
                shutil.copy2(file, folder.path)
    return folder.final


def stored(run: str, name: str, samples: Sequence[Generation]) -> Judge:
    """The verdicts of a judge that read the model, which is not there any more. Raises `UsageError` if a response has
    none."""
    if not all(name in sample["verdicts"] for sample in samples):
        raise UsageError(f"{run} has no verdicts of {name}, which reads the model itself; use it with `tunevax score`")
    return lambda _prompts, _responses: [Verdict(**sample["verdicts"][name]) for sample in samples]


def key(row: Mapping[str, object]) -> tuple:
    """The fields that a row of results and its responses share."""
    return row["model"], row["attack"], row["seed"], row["step"]


def remembering(ref: str) -> Surprise:
    """A reference with a cache: attacked models often repeat their answers."""
    reference, known = Reference(ref, batch_size=64), dict[tuple[Prompt, str], float | None]()

    def surprises(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float | None]:
        pairs = list(zip(prompts, responses, strict=True))
        if new := [pair for pair in dict.fromkeys(pairs) if pair not in known]:
            known.update(zip(new, reference(*zip(*new, strict=True)), strict=True))
        return [known[pair] for pair in pairs]

    return surprises
