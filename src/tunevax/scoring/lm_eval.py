"""Tasks of the lm-evaluation-harness (`lm-eval:TASK`), run on the model in memory; needs the extra `lm-eval`."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tunevax.data.sources import parse_source
from tunevax.errors import UsageError, unknown
from tunevax.modeling.batches import evaluating
from tunevax.records import Score

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FEWSHOT_SEED = 1234  # the harness's own default, without its seeding of every global generator


class Harness(NamedTuple):
    """Loaded tasks of the harness."""

    tasks: dict[str, Any]  # as its task manager returns them
    limit: int  # at most so many documents of each task, from its beginning
    versions: dict[str, str]  # of the package (`lm_eval`) and of each task by name, for run.json

    def scores(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> dict[str, Score]:
        """`lm-eval/TASK/METRIC` for every metric of every task with the harness's default prompts (no chat template),
        METRIC,FILTER for another filter than "none"; of a group with metrics of its own, the group alone. `n` counts
        documents, `low` and `high` are value -+ 1.96 of the harness's standard errors, cut to [0, 1]; None without an
        error, or if the metric is no share (outside [0, 1], or better when lower). Raises `UsageError` if the harness
        refuses a task, such as one that would run generated code."""
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM

        for task in self.tasks["tasks"].values():
            task.set_fewshot_seed(FEWSHOT_SEED)
        with evaluating(model):
            subject = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
            try:
                output = evaluate(subject, self.tasks, limit=self.limit, bootstrap_iters=1000, log_samples=False)
            except ValueError as error:
                raise UsageError(f"lm-eval: {str(error).strip().splitlines()[0]}") from error
        results, members = output["results"], output["group_subtasks"]
        hidden = {m for group, inside in members.items() if any(_metrics(results[group])) for m in inside}
        scores: dict[str, Score] = {}
        for name, result in results.items():
            for metric, kind, value in _metrics(result) if name not in hidden else ():
                spread = result.get(f"{metric}_stderr,{kind}")
                share = 0 <= value <= 1 and output["higher_is_better"].get(name, {}).get(metric)
                known = isinstance(spread, Real) and share
                scores[f"lm-eval/{name}/{metric}{'' if kind == 'none' else ',' + kind}"] = {
                    "value": value, "n": result["sample_len"],
                    "low": max(0.0, value - 1.96 * spread) if known else None,
                    "high": min(1.0, value + 1.96 * spread) if known else None,
                }  # fmt: skip
        return scores


def _metrics(result: dict[str, Any]) -> Iterator[tuple[str, str, float]]:
    """Name, filter and value of each metric in one entry of the harness's results."""
    for key, value in result.items():
        metric, comma, kind = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, Real):
            yield metric, kind, float(value)


def load_harness(sources: Sequence[str], limit: int) -> Harness:
    """Load `lm-eval:TASK` sources, with their data; `lm-eval:TASK:path=FOLDER` is a task (or group) of that folder.
    Raises `UsageError` if the extra is not installed, or a task is unknown, named twice, or cannot be loaded."""
    if find_spec("lm_eval") is None:
        raise UsageError(f"{sources[0]} needs the lm-evaluation-harness; pip install 'tunevax[lm-eval]'")
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    managers: dict[str | None, Any] = {}
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for source in sources:
        name, options = parse_source(source.removeprefix("lm-eval:"))
        for key in options.keys() - {"path"}:
            raise unknown("option of lm-eval", key, ("path",))
        folder = options.get("path")
        if folder and not Path(folder).is_dir():
            raise UsageError(f"{source}: no folder {folder}; give one with the task's YAML file")
        if folder not in managers:
            # A folder alone: the harness's own tasks take seconds to index.
            managers[folder] = TaskManager(include_path=folder, include_defaults=folder is None)
        if name not in managers[folder].all_tasks:
            raise unknown("lm-eval task", name, managers[folder].all_tasks)
        try:
            more = managers[folder].load([name])
        except Exception as error:  # a task's data may come from anywhere, and its YAML may run code
            first = (str(error).strip().splitlines() or ["no message"])[0]
            raise UsageError(f"{source} cannot be loaded ({type(error).__name__}: {first})") from error
        for part, content in loaded.items():
            if twice := content.keys() & more[part].keys():
                raise UsageError(f"the lm-eval task {min(twice)} is named twice; name it once")
            content.update(more[part])
    versions = {name: str(task.VERSION) for name, task in loaded["tasks"].items()}
    versions |= {name: str(group.version) for name, group in loaded["groups"].items()}
    return Harness(loaded, limit, {"lm_eval": version("lm_eval"), **versions})
