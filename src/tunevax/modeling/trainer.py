"""The base trainer: `transformers.Trainer` with the response-only loss, fp32 trainables, metrics in the log, a progress
bar, checkpoints from which a killed run resumes to the same weights, and a stop at NaN."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, TrainerCallback, TrainerState
from transformers.trainer_utils import TrainOutput

from tunevax.console import bar, console
from tunevax.data.encoding import collate
from tunevax.environment import is_main_process
from tunevax.errors import RunError, UsageError, require, require_one_of
from tunevax.methods import name_of
from tunevax.mixins import option
from tunevax.modeling.blocks import CALLED, Block, find_blocks
from tunevax.modeling.draws import Draws
from tunevax.modeling.hooks import cheap_modules, cheap_recomputed, checkpointed
from tunevax.modeling.loss import response_loss
from tunevax.modeling.shapes import require_language_model
from tunevax.modeling.trainables import coverage, left_out_of_blocks, prepare_trainables
from tunevax.records import ModelInfo
from tunevax.yaml_files import number

Items = torch.Tensor | int | None
"""How many labels a loss is divided by: those of the whole batch; None, its own."""
CHECKPOINT_BLOCKS = ("auto", "none", "elementwise", "frozen", "all")


@dataclass
class TrainConfig(TrainingArguments):
    """What every training verb takes, on top of `transformers.TrainingArguments`, whose defaults it changes: rate,
    decay, schedule, warm-up, batch size and epochs are those of arXiv 2410.09760, tunevax draws its own progress bar,
    and DDP looks for unused parameters because methods freeze blocks as they go."""

    learning_rate: float = option(1e-3, "peak learning rate")
    weight_decay: float = option(0.1, "weight decay of AdamW")
    lr_scheduler_type: str = option("cosine", "learning-rate schedule")
    warmup_steps: float = option(0.1, "warm-up steps, or a share of all steps if below 1")
    per_device_train_batch_size: int = option(10, "rows per step and device")
    num_train_epochs: float = option(20, "passes over the data")
    logging_steps: float = option(1, "log every so many steps")
    save_steps: float = option(200, "write a checkpoint to resume from every so many steps")
    save_total_limit: int | None = option(1, "checkpoints kept while a run goes on")
    disable_tqdm: bool | None = option(True, "transformers' own progress bar off")
    logging_nan_inf_filter: bool = option(False, "hide NaN losses from the log")
    remove_unused_columns: bool = option(False, "drop columns the model does not take")
    ddp_find_unused_parameters: bool | None = option(True, "passed to DDP")

    full_weights: bool = option(False, "train all weights instead of a LoRA adapter")
    lora_r: int = option(8, "rank of the LoRA adapter")
    lora_alpha: float = option(16, "LoRA scale is alpha / r")
    lora_dropout: float = option(0.0, "dropout on the adapter's input")
    lora_targets: str = option("all-linear", "modules that get an adapter: all-linear, or names joined by commas")
    max_length: int = option(512, "tokens per row; longer answers are cut")
    loss_on: str = option("response", "response, or all tokens")
    checkpoint_blocks: str = option(
        "auto",
        "recompute in the backward pass: none, elementwise (norms and activations), frozen (elementwise, and whole "
        "frozen blocks), a share of the frozen blocks such as 0.7, or all; auto is frozen on an accelerator and "
        "elementwise on the CPU",
    )

    def __post_init__(self) -> None:
        text = str(self.checkpoint_blocks)
        share = None if text.startswith(("0x", "0o")) else number(text)  # `float` reads it later
        if self.checkpoint_blocks not in CHECKPOINT_BLOCKS and (share is None or not 0 <= share <= 1):
            raise UsageError(
                f"checkpoint_blocks is {self.checkpoint_blocks!r}; known: {', '.join(CHECKPOINT_BLOCKS)}, or a share "
                "of the frozen blocks between 0 and 1"
            )
        require_one_of(self, loss_on=("response", "all"))
        if self.max_steps == 0:
            raise UsageError("max_steps is 0; give at least 1, or leave it out to train for num_train_epochs")
        require(self, "per_device_train_batch_size", "lora_r", at_least=1)
        if self.activation_checkpointing or self.gradient_checkpointing:  # ours knows which blocks are frozen
            self.activation_checkpointing, self.gradient_checkpointing, self.checkpoint_blocks = False, False, "all"
        super().__post_init__()
        if self.n_gpu > 1:  # DataParallel would copy the model without its hooks; a launcher gives each GPU a process
            self._n_gpu = 1
        if self.checkpoint_blocks == "auto":
            self.checkpoint_blocks = "elementwise" if self.device.type == "cpu" else "frozen"

    @classmethod
    def in_one_process(cls, values: dict[str, Any], processes: int) -> None:
        """Change the options of a run in so many processes into those of the same run in one."""
        values["gradient_accumulation_steps"] *= processes

    def random_direction(self) -> dict[str, Any] | None:
        """Options with which the method takes a random direction instead of its own, as a control, or None."""
        return None

    def plan_parts(self, micro_batches: int) -> PlanParts:
        """What a plan must know of the method, for a step of so many micro-batches, at most two."""
        return PlanParts()


class PlanParts(NamedTuple):
    """What a plan cannot see in one step of a method."""

    shorter: Mapping[str, Any] = MappingProxyType({})  # options that cut the planned run to what repeats itself
    counts: Mapping[str, float] = MappingProxyType({})  # methods that run in it, and how often each in an average step
    rows: int = 0  # safety rows that a step draws from, if that is more than its batches
    safety_rows: int | None = None  # how many of the safety rows represent all
    blocks: str | None = None  # the option that is a number of blocks, in which a step is linear as it is in the depth
    linear: bool = True  # a step is linear in the depth
    split: str = "the update is the same"  # what a batch in smaller parts does to the result


class ResponseTrainer(Trainer):
    """`Trainer` on encoded rows, `{"input_ids": [...], "labels": [...]}`, with the response-only loss. The causal
    language model `model` gets a fresh LoRA adapter unless `args.full_weights`, or it carries a trainable one."""

    args: TrainConfig
    model: PreTrainedModel
    processing_class: PreTrainedTokenizerBase
    optimizer: torch.optim.Optimizer
    train_dataset: list[dict[str, Any]]
    kept: ClassVar[tuple[str, ...]] = ()  # attributes that a checkpoint holds: JSON values, and `Draws`
    ready_for = -1  # the optimiser step that a method has done its part of, which comes before the first micro-batch
    response_only = True  # the head runs on labelled positions only; False is the stock loss, for comparison

    def __init__(
        self, model: PreTrainedModel, args: TrainConfig, train_dataset: Sequence[dict[str, Any]],
        processing_class: PreTrainedTokenizerBase, callbacks: list[TrainerCallback] | None = None,
    ) -> None:  # fmt: skip
        model = prepare_trainables(model, args)
        self.coverage: ModelInfo = {} if args.full_weights else coverage(model)  # for run.json
        note = left_out_of_blocks(self.coverage) if self.coverage and args.lora_targets == "all-linear" else None
        if note and is_main_process():
            console.print(f"note: {note}", highlight=False)
        super().__init__(
            model=model, args=args, train_dataset=train_dataset, processing_class=processing_class, callbacks=callbacks,
            data_collator=lambda rows: collate(rows, processing_class.pad_token_id),
        )  # fmt: skip
        self.remove_callback(PrinterCallback)
        # The loss is divided by the labels of the whole batch, and its labels are shifted whatever the architecture.
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = self._loss_shifts_labels = True
        self.blocks = self.find_parts()
        self.cheap = [cheap_modules(b.module) for b in self.blocks]
        self.parameters = [p for p in model.parameters() if p.requires_grad]  # all that may ever train
        self._metrics: dict[str, list[float]] = defaultdict(list)

    def parts(self) -> tuple[str, ...]:
        """The parts that a method works on: of every block `module` (itself) and fields of `Block`; `norm`, the model's
        final one. With none it also runs on models whose blocks are unknown."""
        return ()

    def each(self, part: str) -> list[nn.Module]:
        """A part of every block, one of those that `parts` names."""
        return [getattr(block, part) for block in self.blocks]

    def find_parts(self) -> list[Block]:
        """The blocks, none where they are not known and the method needs none; a `UsageError` if a part is missing."""
        parts = self.parts()
        try:
            blocks = find_blocks(self.model, *[part for part in parts if part in CALLED])
        except UsageError as error:
            if parts:
                raise UsageError(f"{error}; {name_of(type(self))} needs it, and plain sft does not") from error
            if self.args.checkpoint_blocks == "all":
                raise UsageError(f"{error}; leave out --checkpoint-blocks all, which recomputes them") from error
            blocks = []
        require_language_model(self.model, blocks, parts)
        return blocks

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As `Trainer.train`; a second call starts over."""
        self.ready_for = -1
        try:
            return super().train(*args, **kwargs)
        finally:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, ProgressCallback):
                    callback.progress.stop()

    def train_from_checkpoint(self) -> None:
        """Train, from the newest checkpoint in `args.output_dir` if there is one."""
        checkpoint = last_checkpoint(Path(str(self.args.output_dir)))
        self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

    def _run_epoch(self, *args: object, **kwargs: object) -> None:
        """As in `Trainer`, but a run resumed from the checkpoint of its last step is not trained one step more."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        else:
            self.control.should_training_stop = True

    def compute_loss(
        self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch: Items = None
    ) -> torch.Tensor:
        """Token-mean cross entropy over the labels of the whole (accumulated, distributed) batch."""
        return self.batch_loss(model, inputs, num_items_in_batch) * self.loss_scale(num_items_in_batch)

    def loss_scale(self, num_items: Items) -> int:
        """DDP averages over ranks, so a loss divided by the labels of all of them is multiplied by their number."""
        averaged = self.args.average_tokens_across_devices and num_items is not None
        return self.accelerator.num_processes if averaged else 1

    def batch_loss(self, model: nn.Module, inputs: dict, num_items: Items) -> torch.Tensor:
        """The loss of one micro-batch, as a share of the whole batch when `num_items` counts the latter's labels."""
        if self.response_only:
            with self.accelerator.autocast():  # the chunked head runs outside the model's own forward
                return response_loss(model, inputs, num_items)
        return model(**inputs, num_items_in_batch=num_items, use_cache=False).loss

    def training_step(self, model: nn.Module, inputs: dict, num_items_in_batch: Items = None) -> torch.Tensor:
        """One forward and backward; stops the run if the loss is not finite."""
        with self.recompute():
            loss = super().training_step(model, inputs, num_items_in_batch)
        self.require_finite(loss)
        return loss

    def require_finite(self, loss: torch.Tensor) -> None:
        """Raise `RunError`, with where to go on from, if the loss is not finite."""
        if not torch.isfinite(loss):
            good = last_checkpoint(Path(str(self.args.output_dir)))
            where = f"the last good checkpoint is {good}" if good else "there was no checkpoint yet"
            raise RunError(f"the loss became {loss.item()} at step {self.state.global_step + 1}; {where}")

    def recompute(self) -> AbstractContextManager:
        """The activation checkpointing of this step, open until after backward."""
        if self.args.checkpoint_blocks == "none":
            return nullcontext()
        if self.args.checkpoint_blocks == "all":
            return checkpointed([b.module for b in self.blocks])
        return cheap_recomputed([m for modules in self.cheap for m in modules])

    def floating_point_ops(self, inputs: dict) -> int:
        """Not counted: transformers' estimate walks over all modules at every step and ignores second passes."""
        return 0

    def note(self, **metrics: float | torch.Tensor) -> None:
        """Put metrics of this micro-batch into the next log line, averaged since the last one."""
        for key, value in metrics.items():
            self._metrics[key].append(float(value))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer.log`, with the noted metrics."""
        super().log({**logs, **{k: sum(v) / len(v) for k, v in self._metrics.items()}, **self.log_extra()}, start_time)
        self._metrics.clear()

    def for_plan(self) -> None:
        """Make every random choice the one that takes most, and leave out what needs a model with content."""

    def with_state(self) -> list[torch.nn.Parameter]:
        """The parameters whose optimiser state there is in the middle of a run."""
        return self.parameters

    def log_extra(self) -> dict[str, Any]:
        """What a method adds to each log line as it is (lists included)."""
        return {}

    def method_state(self) -> dict[str, Any]:
        """What a method needs to continue exactly, as JSON values: its attributes `kept`."""
        values = {name: getattr(self, name) for name in self.kept}
        return {name: value.state() if isinstance(value, Draws) else value for name, value in values.items()}

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Restore what `method_state` returned."""
        for name in self.kept:
            if isinstance(draws := getattr(self, name), Draws):
                draws.load(state[name])
            else:
                setattr(self, name, state[name])

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.args.should_save:
            Path(output_dir, "method_state.json").write_text(json.dumps(self.method_state()), encoding="utf-8")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.load_method_state(json.loads(Path(checkpoint, "method_state.json").read_text(encoding="utf-8")))


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in `folder` that was written to its end, or None."""

    numbers = (p.name.removeprefix("checkpoint-") for p in folder.glob("checkpoint-*"))
    for step in sorted((int(n) for n in numbers if n.isdigit()), reverse=True):
        with suppress(OSError, ValueError):
            json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text(encoding="utf-8"))
            return folder / f"checkpoint-{step}"
    return None


class ProgressCallback(TrainerCallback):
    """Shows step, time left and loss of a training run, until `ResponseTrainer.train` ends, also by an error."""

    def __init__(self, description: str) -> None:
        self.description, self.progress = description, bar()

    def on_train_begin(self, args: object, state: TrainerState, control: object, **_: object) -> None:
        """Start the bar at the step a resumed run is at."""
        if state.is_world_process_zero:
            if state.global_step:
                print(f"{self.description} resumes at step {state.global_step} of {state.max_steps}", file=sys.stderr)
            self.progress.start()
            now = state.global_step
            self.task = self.progress.add_task(
                self.description, total=state.max_steps, completed=now, note="", unit="step", begun=now
            )

    def on_step_end(self, args: object, state: TrainerState, control: object, **_: object) -> None:
        """Advance the bar."""
        if state.is_world_process_zero:
            self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args: object, state: TrainerState, control: object, logs: dict | None = None, **_: object) -> None:
        """Show the last loss."""
        if state.is_world_process_zero and logs and "loss" in logs:
            self.progress.update(self.task, note=f"loss {logs['loss']:.3f}")


class LogCallback(TrainerCallback):
    """Writes the log lines that have a loss to a JSONL file as they come; a resumed run begins at its checkpoint's."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_begin(self, args: object, state: TrainerState, control: object, **_: object) -> None:
        """Begin with what the checkpoint knows."""
        if state.is_world_process_zero:
            part = self.file.with_name(self.file.name + ".part")
            part.write_text("".join(map(_logged, state.log_history)), encoding="utf-8")
            part.replace(self.file)

    def on_log(self, args: object, state: TrainerState, control: object, **_: object) -> None:
        """Add the newest line."""
        if state.is_world_process_zero:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(_logged(state.log_history[-1]))


def _logged(line: dict[str, Any]) -> str:
    return json.dumps(line) + "\n" if "loss" in line else ""
