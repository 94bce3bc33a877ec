"""`tunevax align`: read the data, load the model, train, and write a run folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tunevax.alignment.held_out import evaluate, fitting, held_out_rows, loss_on
from tunevax.alignment.sft import SFTConfig
from tunevax.data.contamination import chosen_with, count, hashes
from tunevax.data.roles import load_rows
from tunevax.data.safety import answers_in
from tunevax.environment import is_main_process
from tunevax.errors import require, shortened
from tunevax.mixins import AllowOverlap, option, require_given
from tunevax.modeling.method import MethodTrainer
from tunevax.modeling.quantization import require_quantization
from tunevax.records import DataEntry, Example, data_entry
from tunevax.training import TrainingOptions, train, training_run


@dataclass
class AlignOptions(TrainingOptions, AllowOverlap):
    """What `tunevax align` takes besides the method's own configuration."""

    safety_data: str | None = option(None, "prompt, chosen, rejected: file, hub id, organism, or proxy:TOPIC")
    task_data: str | None = option(None, "benign prompt and completion rows mixed in")
    held_out_prompts: int = option(40, "harmful and harmless prompts to evaluate the finished model on, 0 for none")


def align(
    trainer_class: type[MethodTrainer], method: str, options: AlignOptions, config: SFTConfig, command: str = ""
) -> Path:
    """Harden `options.model` and return the run folder.

    Args:
        trainer_class: the method called `method`, e.g. `TVaccineTrainer`.
        config: an instance of `trainer_class.config_class`; its `output_dir` becomes the run folder.

    Raises:
        UsageError: bad data, model or options; nothing is left behind.
        RunError: the loss stopped being finite.
    """
    require_given(options, "model", "safety_data")
    require_quantization(options.quantization, config.full_weights)
    require(options, "held_out_prompts", at_least=0)
    model, safety_data = str(options.model), str(options.safety_data)
    safety, task, data = read_data(trainer_class, method, options)
    held_out = held_out_rows(model, safety_data, options.task_data, safety, options.held_out_prompts)
    overlap = count(model, alignment=safety, **({"benign": task} if task else {}))
    prompts = {"alignment": hashes(safety) | chosen_with(safety_data)}
    if task:
        prompts["benign"] = hashes(task)
    with training_run("align", trainer_class, method, options, config, data, overlap, command) as (run, loaded):
        if is_main_process():
            held_out = fitting(held_out, loaded.model, loaded.tokenizer, config.max_length)
            loss_before = loss_on(loaded.model, held_out.harmful, loaded.tokenizer, config.max_length)
        trainer = train(run, loaded, trainer_class, config, safety_data=safety, task_data=task, prompts=prompts)
        if trainer.is_world_process_zero():
            try:
                run.record["held_out"] = evaluate(trainer, held_out, loss_before)
            except Exception as error:  # it is no part of the training, which is done and saved
                run.record["held_out"] = {"why": f"{type(error).__name__}: {shortened(error)}; score the finished run"}
    return run.final


def read_data(
    trainer_class: type[MethodTrainer], method: str, options: AlignOptions
) -> tuple[list[Example], list[Example] | None, list[DataEntry]]:
    """Safety rows, benign rows or None, and what run.json says of them."""
    source = str(options.safety_data)
    safety = load_rows("alignment", source, answers_in(trainer_class.needs), method)
    data = [data_entry("alignment", source, safety)]
    if not options.task_data:
        return safety, None, data
    task = load_rows("benign", options.task_data)
    return safety, task, [*data, data_entry("benign", options.task_data, task)]
