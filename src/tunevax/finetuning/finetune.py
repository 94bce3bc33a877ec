"""`tunevax finetune`: read the customer's data, screen it, train on it with a defence, and write a run folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunevax.data.contamination import chosen_with, count, hashes
from tunevax.data.roles import load_rows
from tunevax.errors import UsageError, unknown
from tunevax.finetuning.sft import FinetuneConfig
from tunevax.mixins import ResumableRunOptions, TrainedModelOptions, require_given
from tunevax.modeling.callbacks import LogCallback, ProgressCallback
from tunevax.modeling.loading import load
from tunevax.modeling.memory import StepMemory
from tunevax.modeling.quantization import require_quantization
from tunevax.modeling.trainer import final_loss, last_checkpoint, rehearse, resolved, save_weights
from tunevax.records import LOG, data_entry, digest, is_run
from tunevax.runs import record_prompts, writing

SCREENS = ("off", "report", "drop", "fail")


@dataclass
class FinetuneOptions(TrainedModelOptions, ResumableRunOptions):
    """What `tunevax finetune` takes besides the method's own configuration."""

    task_data: str | None = field(
        default=None,
        metadata={
            "help": "the customer's rows, prompt and completion; all rows of a file, the train split of a named task"
        },
    )
    safety_data: str | None = field(
        default=None, metadata={"help": "prompt, chosen, rejected, for methods and screens that need them"}
    )
    screen: str = field(
        default="off",
        metadata={
            "help": "look for attacks in the customer's rows before training: off, report, drop (train without the "
            "flagged rows), fail (stop if there are any); needs safety data with both answers"
        },
    )

    def __post_init__(self) -> None:
        if self.screen in ("no", "false"):  # what other tools write for off
            self.screen = "off"
        if self.screen not in SCREENS:
            raise unknown("screen", self.screen, SCREENS)


def finetune(
    trainer_class: type, method: str, options: FinetuneOptions, config: FinetuneConfig, command: str = ""
) -> Path:
    """Run a customer's job on `options.model` and return the run folder.

    The last adapter of the model is merged, and a fresh one (or all weights) trained.

    Args:
        trainer_class: the method, e.g. `LisaTrainer`.
        method: its name, for the record.
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
    task = load_rows("customer", options.task_data)
    need = ("chosen", "rejected") if options.screen != "off" else trainer_class.needs
    safety = safety_rows(options, need, method)
    record: dict[str, Any] = {
        "verb": "finetune",
        "method": method,
        "paper": trainer_class.paper,
        "command": command,
        "seed": config.seed,
        "data": [
            *([data_entry("alignment", options.safety_data, safety)] if safety else []),
            data_entry("task", options.task_data, task),
        ],
        "overlap": count(options.model, alignment=safety, task=task),
        "parent": str(Path(options.model).absolute()) if is_run(options.model) else None,
        "config": resolved(options, config),
    }
    with writing(config.output_dir, record, options.resume, options.overwrite) as run:
        loaded = load(
            options.model,
            revision=options.revision,
            dtype=options.dtype,
            chat_template=options.chat_template,
            quantization=options.quantization,
        )
        if options.screen != "off":
            from tunevax.finetuning.screen import act, screen

            found = screen(loaded.model, loaded.tokenizer, task, safety, config.max_length, config.seed)
            task, record["screen"] = act(found, task, options.screen, options.task_data, run)
        config.output_dir = str(run.checkpoints)
        memory = StepMemory()
        callbacks = [ProgressCallback(f"finetune {method}"), LogCallback(run.path / LOG), memory]
        trainer = trainer_class(
            loaded.model, config, task, loaded.tokenizer, safety if trainer_class.needs else None, callbacks
        )
        trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        base = record["parent"] or loaded.info["base"]
        rehearse(trainer, run.path, base)
        checkpoint = last_checkpoint(run.checkpoints)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if trainer.is_world_process_zero():
            save_weights(trainer, run.path, base)
            seen = hashes(safety) | (chosen_with(options.safety_data) if safety else set())
            record_prompts(run.path, alignment=seen, task=hashes(task))
        record.update(
            model={**loaded.info, "trainable": trainable, **trainer.coverage},
            adapter="model" if config.full_weights else "adapter", template_hash=digest(loaded.tokenizer.chat_template),
            steps=trainer.state.global_step, final_loss=final_loss(trainer.state.log_history),
            compute={"per_step": trainer.cost(), "total": trainer.cost() * trainer.state.global_step},
            **({"peak_memory_bytes": memory.peak} if memory.peak else {}),
        )  # fmt: skip
    return run.final


def safety_rows(options: FinetuneOptions, need: Sequence[str], method: str) -> list[dict[str, Any]]:
    """The alignment split of the safety data, or nothing where neither the method nor the screen needs it."""
    if not need:
        return []
    purpose = method if options.screen == "off" else f"{method} with --screen {options.screen}"
    if options.safety_data is None:
        raise UsageError(f"--safety-data is missing: {purpose} needs rows with {' and '.join(need)}")
    return load_rows("alignment", options.safety_data, need, purpose)
