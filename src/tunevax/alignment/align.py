"""`tunevax align`: read the data, load the model, train, and write a run folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunevax.alignment.held_out import evaluate, fitting, held_out_rows, loss_on
from tunevax.alignment.sft import SFTConfig
from tunevax.data.contamination import chosen_with, count, hashes
from tunevax.data.roles import load_rows
from tunevax.environment import is_main_process
from tunevax.errors import UsageError, shortened
from tunevax.mixins import AllowOverlap, ResumableRunOptions, TrainedModelOptions, require_given
from tunevax.modeling.callbacks import LogCallback, ProgressCallback
from tunevax.modeling.loading import load
from tunevax.modeling.memory import StepMemory
from tunevax.modeling.quantization import require_quantization
from tunevax.modeling.trainer import final_loss, last_checkpoint, rehearse, resolved, save_weights
from tunevax.records import LOG, data_entry, digest, is_run
from tunevax.runs import record_prompts, writing


@dataclass
class AlignOptions(TrainedModelOptions, AllowOverlap, ResumableRunOptions):
    """What `tunevax align` takes besides the method's own configuration."""

    safety_data: str | None = field(
        default=None, metadata={"help": "prompt, chosen, rejected: file, hub id, or organism"}
    )
    task_data: str | None = field(default=None, metadata={"help": "benign prompt and completion rows mixed in"})
    held_out_prompts: int = field(
        default=40,
        metadata={"help": "harmful and harmless prompts that the finished model is evaluated on, 0 for none"},
    )


def align(trainer_class: type, method: str, options: AlignOptions, config: SFTConfig, command: str = "") -> Path:
    """Harden `options.model` and return the run folder.

    Args:
        trainer_class: the method, e.g. `TVaccineTrainer`.
        method: its name, for the record.
        config: an instance of `trainer_class.config_class`; its `output_dir` becomes the run folder.

    Raises:
        UsageError: bad data, model or options; nothing is left behind.
        RunError: the loss stopped being finite.
    """
    require_given(options, "model", "safety_data")
    require_quantization(options.quantization, config.full_weights)
    if options.held_out_prompts < 0:
        raise UsageError(f"held_out_prompts is {options.held_out_prompts}; it must be at least 0")
    safety, task, data = read_data(trainer_class, method, options)
    held_out = held_out_rows(options.model, options.safety_data, options.task_data, safety, options.held_out_prompts)
    record: dict[str, Any] = {
        "verb": "align",
        "method": method,
        "paper": trainer_class.paper,
        "command": command,
        "seed": config.seed,
        "data": data,
        "overlap": count(options.model, alignment=safety, **({"benign": task} if task else {})),
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
        config.output_dir = str(run.checkpoints)
        if is_main_process():
            held_out = fitting(held_out, loaded.model, loaded.tokenizer, config.max_length)
            loss_before = loss_on(loaded.model, held_out.harmful, loaded.tokenizer, config.max_length)
        memory = StepMemory()
        callbacks = [ProgressCallback(f"align {method}"), LogCallback(run.path / LOG), memory]
        trainer = trainer_class(loaded.model, config, safety, loaded.tokenizer, task, callbacks)
        trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        base = record["parent"] or loaded.info["base"]
        rehearse(trainer, run.path, base)
        checkpoint = last_checkpoint(run.checkpoints)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if trainer.is_world_process_zero():
            save_weights(trainer, run.path, base)
            seen = hashes(safety) | chosen_with(options.safety_data)
            record_prompts(run.path, alignment=seen, **({"benign": hashes(task)} if task else {}))
            try:
                record["held_out"] = evaluate(trainer, held_out, loss_before)
            except Exception as error:  # it is no part of the training, which is done and saved
                record["held_out"] = {"why": f"{type(error).__name__}: {shortened(error)}; score the finished run"}
        record.update(
            model={**loaded.info, "trainable": trainable, **trainer.coverage},
            adapter="model" if config.full_weights else "adapter", template_hash=digest(loaded.tokenizer.chat_template),
            steps=trainer.state.global_step, final_loss=final_loss(trainer.state.log_history),
            compute={"per_step": trainer.cost(), "total": trainer.cost() * trainer.state.global_step},
            updates_per_block=trainer.updates(),
            **({"peak_memory_bytes": memory.peak} if memory.peak else {}),
        )  # fmt: skip
    return run.final


def read_data(trainer_class: type, method: str, options: AlignOptions) -> tuple[list[dict], list[dict] | None, list]:
    """Safety rows, benign rows or None, and what run.json says of them."""
    need = ("chosen", "rejected") if trainer_class.needs_rejected else ("chosen",)
    safety = load_rows("alignment", options.safety_data, need, method)
    data = [data_entry("alignment", options.safety_data, safety)]
    if not options.task_data:
        return safety, None, data
    task = load_rows("benign", options.task_data)
    return safety, task, [*data, data_entry("benign", options.task_data, task)]
