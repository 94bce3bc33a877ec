"""`tunevax finetune`: read the customer's data, screen it, train on it with a defence, and write a run folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tunevax.data.contamination import chosen_with, count, hashes
from tunevax.data.roles import load_rows
from tunevax.data.safety import answers_in
from tunevax.errors import UsageError, require_one_of
from tunevax.finetuning.sft import JobConfig
from tunevax.mixins import option, require_given
from tunevax.modeling.method import MethodTrainer
from tunevax.modeling.quantization import require_quantization
from tunevax.records import Example, data_entry
from tunevax.training import TrainingOptions, train, training_run


@dataclass
class FinetuneOptions(TrainingOptions):
    """What `tunevax finetune` takes besides the method's own configuration."""

    task_data: str | None = option(None, "the customer's prompt and completion rows: a file, or a task's train split")
    safety_data: str | None = option(None, "prompt, chosen, rejected, for methods and screens that need them")
    screen: str = option(
        "off",
        "look for attacks in the customer's rows before training: off, report, drop (train without the "
        "flagged rows), fail (stop if there are any); needs safety data with both answers",
    )

    def __post_init__(self) -> None:
        if self.screen in ("no", "false"):  # what other tools write for off
            self.screen = "off"
        require_one_of(self, screen=("off", "report", "drop", "fail"))


def finetune(
    trainer_class: type[MethodTrainer], method: str, options: FinetuneOptions, config: JobConfig, command: str = ""
) -> Path:
    """Run a customer's job on `options.model` and return the run folder.

    The last adapter of the model is merged, and a fresh one (or all weights) trained.

    Args:
        trainer_class: the method called `method`, e.g. `LisaTrainer`.
        config: an instance of `trainer_class.config_class`; its `output_dir` becomes the run folder.

    Raises:
        UsageError: bad data, model or options, or rows flagged under `screen="fail"`; nothing is left behind.
        RunError: the loss stopped being finite.
    """
    require_given(options, "model", "task_data")
    require_quantization(options.quantization, config.full_weights)
    if options.quantization is not None and options.screen != "off":
        raise UsageError(
            f"--screen {options.screen} takes gradients of frozen weights, which an {options.quantization} base has "
            "none of; screen the rows in a run without --quantization"
        )
    source, screening = str(options.task_data), options.screen != "off"
    task = load_rows("customer", source)
    safety: list[Example] = []
    data = [data_entry("task", source, task)]
    if need := ("chosen", "rejected") if screening else answers_in(trainer_class.needs):
        purpose = f"{method} with --screen {options.screen}" if screening else method
        if options.safety_data is None:
            raise UsageError(f"--safety-data is missing: {purpose} needs rows with {' and '.join(need)}")
        safety = load_rows("alignment", options.safety_data, need, purpose)
        data.insert(0, data_entry("alignment", options.safety_data, safety))
    overlap = count(str(options.model), alignment=safety, task=task)
    with training_run("finetune", trainer_class, method, options, config, data, overlap, command) as (run, loaded):
        if screening:
            from tunevax.finetuning.screen import act, screen

            screened = screen(loaded.model, loaded.tokenizer, task, safety, config.max_length, config.seed)
            task, run.record["screen"] = act(screened, task, options.screen, source, run)
        seen = hashes(safety) | (chosen_with(str(options.safety_data)) if safety else set())
        prompts = {"alignment": seen, "task": hashes(task)}
        train(run, loaded, trainer_class, config, safety_data=safety, task_data=task, prompts=prompts)
    return run.final
