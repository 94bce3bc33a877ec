"""One run of one trainer, and the same run again with changes."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tunevax.errors import TunevaxError, UsageError
from tunevax.files import require_room
from tunevax.mixins import ResumableRunOptions, TrainedModelOptions
from tunevax.modeling.biases import save_biases
from tunevax.modeling.loading import Loaded, load
from tunevax.modeling.memory import StepMemory
from tunevax.modeling.method import MethodTrainer
from tunevax.modeling.trainer import LogCallback, ProgressCallback, ResponseTrainer, TrainConfig
from tunevax.records import LOG, DataEntry, Example, RunRecord, digest, is_run
from tunevax.runs import RunFolder, record_prompts, writing

Options = TypeVar("Options")


@dataclass
class TrainingOptions(TrainedModelOptions, ResumableRunOptions):
    """What every verb that trains a model takes: the model, and the run folder."""


@contextmanager
def training_run(
    verb: str, trainer_class: type[MethodTrainer], method: str, options: TrainingOptions, config: TrainConfig,
    data: list[DataEntry], overlap: dict[str, int], command: str,
) -> Iterator[tuple[RunFolder, Loaded]]:  # fmt: skip
    """Open the run folder `config.output_dir` and load `options.model`; on success the folder is complete. `method` is
    the name of `trainer_class`. Raises `UsageError` as `writing` and `load` do."""
    model = str(options.model)
    record: RunRecord = {
        "verb": verb, "method": method, "paper": trainer_class.paper, "command": command, "seed": config.seed,
        "data": data, "overlap": overlap, "parent": str(Path(model).absolute()) if is_run(model) else None,
        "config": resolved(options, config),
    }  # fmt: skip
    with writing(str(config.output_dir), record, options.resume, options.overwrite) as run:
        yield run, load(
            model, revision=options.revision, dtype=options.dtype, chat_template=options.chat_template,
            quantization=options.quantization,
        )  # fmt: skip


def train(
    run: RunFolder, loaded: Loaded, trainer_class: type[MethodTrainer], config: TrainConfig, *,
    safety_data: Sequence[Example] | None, task_data: Sequence[Example] | None, prompts: Mapping[str, Iterable[str]],
) -> MethodTrainer:  # fmt: skip
    """Train `loaded` into `run`, from its newest checkpoint if there is one, and record what was done.

    Args:
        prompts: the hashes of the prompts trained on, by role.

    Raises:
        UsageError: bad data; the weights could not be saved at the end.
        RunError: the loss stopped being finite.
    """
    record, memory = run.record, StepMemory()
    config.output_dir = str(run.checkpoints)
    progress = ProgressCallback(f"{record['verb']} {record['method']}")
    trainer = trainer_class(
        loaded.model, config, safety_data=safety_data, task_data=task_data, processing_class=loaded.tokenizer,
        callbacks=[progress, LogCallback(run.path / LOG), memory],
    )  # fmt: skip
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    base = record["parent"] or loaded.info["base"]
    rehearse(trainer, run.path, base)
    trainer.train_from_checkpoint()
    if trainer.is_world_process_zero():
        save_weights(trainer, run.path, base)
        record_prompts(run.path, **prompts)
    steps, history = trainer.state.global_step, trainer.state.log_history
    done: RunRecord = {
        "model": {**loaded.info, "trainable": trainable, **trainer.coverage},
        "adapter": "model" if config.full_weights else "adapter",
        "template_hash": digest(loaded.tokenizer.chat_template), "steps": steps,
        "final_loss": next((line["loss"] for line in reversed(history) if "loss" in line), None),
        "compute": {"per_step": trainer.cost(), "total": trainer.cost() * steps},
        "updates_per_block": trainer.updates(),
    }  # fmt: skip
    record.update(done)
    if memory.peak:
        record["peak_memory_bytes"] = memory.peak
    return trainer


def resolved(options: TrainingOptions, config: TrainConfig) -> dict[str, Any]:
    """Every option of a run as plain values, without what says only where to write and how to start."""
    values = {**vars(options), **config.to_dict()}
    placing = ("output_dir", "resume", "overwrite", "run_name", "resume_from_checkpoint")
    return {k: v for k, v in values.items() if k not in placing}


def replay(record: RunRecord, kind: type[Options], **changes: Any) -> Options:
    """Options of a recorded run, with changes, to run it again in one process: an instance of the dataclass `kind`.

    What other processes had of a batch becomes further micro-batches. Options of the hub are left out: a replay is not
    published, and tokens are masked in a record.
    """
    values, processes = dict(record["config"]), record["hardware"]["processes"]
    if issubclass(kind, TrainConfig):
        kind.in_one_process(values, processes)
    names = {f.name for f in dataclasses.fields(kind) if f.init}  # type: ignore[arg-type]
    values = {k: v for k, v in values.items() if k in names and not k.startswith(("hub_", "push_to_hub"))}
    return kind(**(values | changes))


def other_data(record: RunRecord, data: Sequence[DataEntry]) -> str | None:
    """Which of the sources in `data` no longer has the rows that a run was trained on, as a clause; None: all have."""
    for now in data:
        before = next(entry for entry in record["data"] if entry["role"] == now["role"])
        if before["hash"] != now["hash"]:
            counts = f"{before['rows']} rows then, {now['rows']} now"
            return f"{now['source']} is no longer what it was trained on ({counts}, or other text)"
    return None


def save_weights(trainer: ResponseTrainer, folder: Path, base: str) -> None:
    """The adapter as PEFT saves it (or the whole model), with tokenizer and chat template beside it.

    `base` is what the adapter belongs on: the base model, or the parent run, which stock PEFT refuses to load rather
    than put the adapter on the wrong weights.
    """
    model, full = trainer.accelerator.unwrap_model(trainer.model), trainer.args.full_weights
    place = folder / ("model" if full else "adapter")
    if not full:
        model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(place)
    if full:
        save_biases(model, place)  # a lock on it is in no state dict
    trainer.processing_class.save_pretrained(place)


def rehearse(trainer: ResponseTrainer, folder: Path, base: str) -> None:
    """Try the end of a run in `folder` before its first step: all of `save_weights` but the writing of the weights'
    bytes, and whether there is room for these and for the checkpoints.

    Raises:
        UsageError: the model cannot be saved, or there is no room.
    """
    if not trainer.is_world_process_zero():
        return
    args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
    config = getattr(model, "peft_config", {}).get("default")  # saving notes things in these two
    before = [(thing, dict(vars(thing))) for thing in (model.config, config) if thing is not None]
    trial = folder / "trial"
    try:
        with weighed() as sizes:
            save_weights(trainer, trial, base)
    except TunevaxError:
        raise
    except OSError as error:
        raise UsageError(f"{folder}: {error.strerror or error}; fix that, or choose another --output-dir") from error
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        way = "leave out --full-weights" if args.full_weights else "choose other --lora-targets"
        raise UsageError(
            f"the weights of {type(model).__name__} could not be saved at the end: {first}; fix that, or {way}"
        ) from error
    finally:
        shutil.rmtree(trial, ignore_errors=True)
        for thing, values in before:
            vars(thing).clear()
            vars(thing).update(values)
    weights, together = sum(sizes), checkpoints_together(trainer)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    optim = str(getattr(args.optim, "value", args.optim))
    per_weight = 2 if "8bit" in optim else 8  # two numbers
    moments = per_weight * trained if optim.startswith("adam") and not args.save_only_model else 0
    resumed = sum(p.stat().st_size for p in Path(str(args.output_dir)).rglob("*") if p.is_file())
    kept = min(together, args.save_total_limit or together)
    needed = max(together * (weights + moments), kept * (weights + moments) + weights)
    hint = "lower --save-total-limit, pass --save-strategy no, or " if together else ""
    require_room(folder, max(0, needed - resumed), max([*sizes, moments if together else 0]), hint)


@contextmanager
def weighed() -> Iterator[list[int]]:
    """Inside, safetensors writes no file; the list receives the bytes that each would have."""
    import safetensors.torch

    original = safetensors.torch.serialize_file
    sizes: list[int] = []

    def weigh(tensors: Mapping[str, Any], *_: object, **__: object) -> None:
        sizes.append(sum(spec.data_len for spec in tensors.values()))

    safetensors.torch.serialize_file = weigh  # type: ignore[assignment]
    try:
        yield sizes
    finally:
        safetensors.torch.serialize_file = original


def checkpoints_together(trainer: ResponseTrainer) -> int:
    """How many checkpoints there are at once, at most: a new one is written before the oldest is removed."""
    args = trainer.args
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    steps_per_epoch = max(1, math.ceil(len(trainer.train_dataset) / batch))
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)
    strategy = str(getattr(args.save_strategy, "value", args.save_strategy))
    every = args.save_steps if args.save_steps >= 1 else max(1, math.ceil(args.save_steps * steps))
    every = steps_per_epoch if strategy == "epoch" else every
    count = 0 if strategy == "no" else math.ceil(steps / every)  # the last step is saved, too
    return min(count, args.save_total_limit + 1) if args.save_total_limit else count
