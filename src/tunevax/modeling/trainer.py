"""The small base trainer: `transformers.Trainer` with the response-only loss, fp32 trainables, metrics that reach
the log, a progress bar, checkpoints from which a killed run resumes to the same weights, and a stop at NaN."""

from __future__ import annotations

import functools
import inspect
import json
import math
import re
import shutil
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from tunevax.console import console
from tunevax.data.encoding import collate
from tunevax.environment import is_main_process
from tunevax.errors import RunError, TunevaxError, UsageError
from tunevax.files import require_room
from tunevax.modeling.adapters import coverage, left_out_of_blocks, require_targets, split_targets
from tunevax.modeling.biases import save_biases
from tunevax.modeling.blocks import CALLED, Block, find_blocks
from tunevax.modeling.callbacks import ProgressCallback
from tunevax.modeling.hooks import cheap_modules, cheap_recomputed, checkpointed
from tunevax.modeling.loss import response_loss
from tunevax.modeling.precision import wide
from tunevax.modeling.quantization import scales_of
from tunevax.modeling.shapes import require_language_model

CHECKPOINT_BLOCKS = ("auto", "none", "elementwise", "frozen", "all")


@dataclass
class TrainConfig(TrainingArguments):
    """What every training verb of tunevax takes, on top of `transformers.TrainingArguments`.

    Defaults that differ from `TrainingArguments`: `learning_rate=1e-3`, `weight_decay=0.1`,
    `lr_scheduler_type="cosine"`, `warmup_steps=0.1` (a share), `per_device_train_batch_size=10`,
    `num_train_epochs=20` (all from arXiv 2410.09760), `logging_steps=1`, `save_steps=200`, `save_total_limit=1`,
    `disable_tqdm=True` (tunevax draws its own bar), `logging_nan_inf_filter=False`, `remove_unused_columns=False`,
    `ddp_find_unused_parameters=True` (methods freeze blocks as they go).
    """

    learning_rate: float = field(default=1e-3, metadata={"help": "peak learning rate"})
    weight_decay: float = field(default=0.1, metadata={"help": "weight decay of AdamW"})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "learning-rate schedule"})
    warmup_steps: float = field(default=0.1, metadata={"help": "warm-up steps, or a share of all steps if below 1"})
    per_device_train_batch_size: int = field(default=10, metadata={"help": "rows per step and device"})
    num_train_epochs: float = field(default=20, metadata={"help": "passes over the data"})
    logging_steps: float = field(default=1, metadata={"help": "log every so many steps"})
    save_steps: float = field(default=200, metadata={"help": "write a checkpoint to resume from every so many steps"})
    save_total_limit: int | None = field(default=1, metadata={"help": "checkpoints kept while a run goes on"})
    disable_tqdm: bool | None = field(default=True, metadata={"help": "transformers' own progress bar off"})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "hide NaN losses from the log"})
    remove_unused_columns: bool = field(default=False, metadata={"help": "drop columns the model does not take"})
    ddp_find_unused_parameters: bool | None = field(default=True, metadata={"help": "passed to DDP"})

    full_weights: bool = field(default=False, metadata={"help": "train all weights instead of a LoRA adapter"})
    lora_r: int = field(default=8, metadata={"help": "rank of the LoRA adapter"})
    lora_alpha: float = field(default=16, metadata={"help": "LoRA scale is alpha / r"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout on the adapter's input"})
    lora_targets: str = field(
        default="all-linear", metadata={"help": "modules that get an adapter: all-linear, or names joined by commas"}
    )
    max_length: int = field(default=512, metadata={"help": "tokens per row; longer answers are cut"})
    loss_on: str = field(default="response", metadata={"help": "response, or all tokens"})
    checkpoint_blocks: str = field(
        default="auto",
        metadata={
            "help": "recompute in the backward pass: none, elementwise (norms and activations), frozen (elementwise, "
            "and whole frozen blocks), a share of the frozen blocks such as 0.7, or all; auto is frozen on an "
            "accelerator and elementwise on the CPU"
        },
    )

    def __post_init__(self) -> None:
        if self.checkpoint_blocks not in CHECKPOINT_BLOCKS and not _is_share(self.checkpoint_blocks):
            raise UsageError(
                f"checkpoint_blocks is {self.checkpoint_blocks!r}; known: {', '.join(CHECKPOINT_BLOCKS)}, or a share "
                "of the frozen blocks between 0 and 1"
            )
        if self.loss_on not in ("response", "all"):
            raise UsageError(f"loss_on is {self.loss_on!r}; known: response, all")
        if self.max_steps == 0:
            raise UsageError("max_steps is 0; give at least 1, or leave it out to train for num_train_epochs")
        if self.per_device_train_batch_size < 1:
            raise UsageError(
                f"per_device_train_batch_size is {self.per_device_train_batch_size}; it must be at least 1"
            )
        if self.lora_r < 1:
            raise UsageError(f"lora_r is {self.lora_r}; it must be at least 1")
        if self.activation_checkpointing or self.gradient_checkpointing:  # ours knows which blocks are frozen
            self.activation_checkpointing, self.gradient_checkpointing, self.checkpoint_blocks = False, False, "all"
        super().__post_init__()
        if self.n_gpu > 1:  # DataParallel would copy the model without its hooks; a launcher gives each GPU a process
            self._n_gpu = 1
        if self.checkpoint_blocks == "auto":
            self.checkpoint_blocks = "elementwise" if self.device.type == "cpu" else "frozen"


def _is_share(text: str) -> bool:
    try:
        return 0 <= float(text) <= 1
    except ValueError:
        return False


class ResponseTrainer(Trainer):
    """`Trainer` on rows of token ids and labels, with the response-only loss.

    Args:
        model: a causal language model; unless `args.full_weights`, or it already carries a trainable adapter,
            it gets a fresh LoRA adapter.
        args: the configuration.
        train_dataset: encoded rows, `{"input_ids": [...], "labels": [...]}`.
        processing_class: the tokenizer, saved with every checkpoint.

    Attributes:
        coverage: which matrices have an adapter and which do not, for run.json; empty where all weights train.
    """

    ready_for = -1  # the optimiser step that a method has done its part of, which comes before the first micro-batch
    response_only = True  # the head runs on labelled positions only; False is the stock loss, for comparison

    def __init__(
        self,
        model: Any,
        args: TrainConfig,
        train_dataset: Sequence[dict],
        processing_class: Any,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        model = prepare_trainables(model, args)
        self.coverage = {} if args.full_weights else coverage(model)
        note = left_out_of_blocks(self.coverage) if self.coverage and args.lora_targets == "all-linear" else None
        if note and is_main_process():
            console.print(f"note: {note}", highlight=False)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            processing_class=processing_class,
            data_collator=lambda rows: collate(rows, processing_class.pad_token_id),
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)
        # The loss is divided by the labels of the whole batch, and its labels are shifted whatever the architecture.
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = self._loss_shifts_labels = True
        self.blocks = self.find_parts()
        self.cheap = [cheap_modules(b.module) for b in self.blocks]
        self.parameters = [p for p in model.parameters() if p.requires_grad]  # all that may ever train
        self._metrics: dict[str, list[float]] = defaultdict(list)

    def parts(self) -> tuple[str, ...]:
        """What a method works on of every block: `module` for the block itself, and fields of `Block`; and `norm`, the
        model's final one. With none of them it runs on models whose blocks are not known at all."""
        return ()

    def find_parts(self) -> list[Block]:
        """The blocks, if the model has what the method needs of them; none where it needs none and they are not known.

        Raises:
            UsageError: the model has not; the message names the part.
        """
        parts = self.parts()
        try:
            blocks = find_blocks(self.model, *[part for part in parts if part in CALLED])
        except UsageError as error:
            if parts:
                raise UsageError(f"{error}; {type(self).__name__} needs it, and plain sft does not") from error
            if self.args.checkpoint_blocks == "all":
                raise UsageError(f"{error}; leave out --checkpoint-blocks all, which recomputes them") from error
            blocks = []
        require_language_model(self.model, blocks, parts)
        return blocks

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`; a second call starts over."""
        self.ready_for = -1
        try:
            return super().train(*args, **kwargs)
        finally:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, ProgressCallback):
                    callback.progress.stop()  # an error, too, ends the bar

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As in `Trainer`, but a run resumed from the checkpoint of its last step is not trained one step more."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        else:
            self.control.should_training_stop = True

    def compute_loss(
        self, model: Any, inputs: dict, return_outputs: bool = False, num_items_in_batch: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Token-mean cross entropy over the labels of the whole (accumulated, distributed) batch."""
        return self.batch_loss(model, inputs, num_items_in_batch) * self.loss_scale(num_items_in_batch)

    def loss_scale(self, num_items: torch.Tensor | int | None) -> int:
        """DDP averages over ranks, so a loss divided by the labels of all of them is multiplied by their number."""
        return (
            self.accelerator.num_processes if self.args.average_tokens_across_devices and num_items is not None else 1
        )

    def batch_loss(self, model: Any, inputs: dict, num_items: torch.Tensor | None) -> torch.Tensor:
        """The loss of one micro-batch, as a share of the whole batch when `num_items` counts the latter's labels."""
        if self.response_only:
            with self.accelerator.autocast():  # the chunked head runs outside the model's own forward
                return response_loss(model, inputs, num_items)
        return model(**inputs, num_items_in_batch=num_items, use_cache=False).loss

    def training_step(self, model: Any, inputs: dict, num_items_in_batch: torch.Tensor | None = None) -> torch.Tensor:
        """One forward and backward; stops the run if the loss is not finite."""
        with self.recompute():
            loss = super().training_step(model, inputs, num_items_in_batch)
        self.require_finite(loss)
        return loss

    def require_finite(self, loss: torch.Tensor) -> None:
        """Raise `RunError`, with where to go on from, if the loss is not finite."""
        if not torch.isfinite(loss):
            good = last_checkpoint(Path(self.args.output_dir))
            where = f"the last good checkpoint is {good}" if good else "there was no checkpoint yet"
            raise RunError(f"the loss became {loss.item()} at step {self.state.global_step + 1}; {where}")

    def recompute(self) -> Any:
        """The activation checkpointing of this step, open until after backward."""
        if self.args.checkpoint_blocks == "none":
            return nullcontext()
        if self.args.checkpoint_blocks == "all":
            return checkpointed([b.module for b in self.blocks])
        return cheap_recomputed([m for modules in self.cheap for m in modules])

    def floating_point_ops(self, inputs: dict) -> int:
        """Not counted: transformers' estimate walks over all modules at every step and knows nothing of two passes."""
        return 0

    def note(self, **metrics: float | torch.Tensor) -> None:
        """Put metrics of this micro-batch into the next log line, averaged since the last one."""
        for key, value in metrics.items():
            self._metrics[key].append(float(value))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer.log`, with the noted metrics."""
        super().log({**logs, **{k: sum(v) / len(v) for k, v in self._metrics.items()}, **self.log_extra()}, start_time)
        self._metrics.clear()

    def log_extra(self) -> dict[str, Any]:
        """What a method adds to each log line as it is (lists included)."""
        return {}

    # --- state of the method in the checkpoint -----------------------------------------------------------------

    def method_state(self) -> dict[str, Any]:
        """What a method needs to continue exactly, as JSON values."""
        return {}

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Take back what `method_state` gave."""

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.args.should_save:
            Path(output_dir, "method_state.json").write_text(json.dumps(self.method_state()), encoding="utf-8")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.load_method_state(json.loads(Path(checkpoint, "method_state.json").read_text(encoding="utf-8")))


def prepare_trainables(model: Any, args: TrainConfig) -> Any:
    """Give `model` a fresh LoRA adapter (or all its weights) to train, in fp32.

    A model that comes with a trainable adapter keeps it. `all-linear` is every linear layer but the head, and the
    matrices of fused experts. Raises `UsageError` if one of `lora_targets` matches nothing.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    if args.full_weights:
        if scales_of(model):
            raise UsageError("full_weights trains all weights, and a quantised model's are frozen; train an adapter")
        for parameter in model.parameters():
            parameter.requires_grad_(True)
    elif isinstance(model, PeftModel):
        if model.active_peft_config.is_prompt_learning:  # its tokens in front shift all that is taken by position
            raise UsageError(
                f"the model comes with an adapter of kind {model.active_peft_config.peft_type.value}, which trains a "
                "prompt and no weights; give the model without it, or one with a LoRA adapter"
            )
    else:
        targets, experts = split_targets(model, args.lora_targets)
        if experts and args.lora_dropout:
            raise UsageError(
                f"PEFT has no dropout for the fused matrices of {type(model).__name__} ({', '.join(experts)}); leave "
                "out --lora-dropout, or name linear layers alone in --lora-targets"
            )
        leave_out = no_place_for_an_adapter(model) if targets == "all-linear" else []
        config = LoraConfig(
            r=args.lora_r,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            target_modules=targets,
            exclude_modules=leave_out or None,
            target_parameters=experts or None,
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng():  # the adapter's start depends on the seed only
            torch.manual_seed(args.seed)
            try:
                model = get_peft_model(model, config)
            except ValueError as error:
                raise UsageError(f"lora_targets {args.lora_targets!r}: {str(error).splitlines()[0]}") from error
        require_targets(model, args.lora_targets)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = wide(parameter.data)
    return model


def no_place_for_an_adapter(model: Any) -> list[str]:
    """Linear layers that `all-linear` leaves out, by path.

    - Linear by class alone: they do not give [..., out] for [..., in]. Llama 4's router gives scores and logits, and
      PEFT would add an adapter's output to the pair.
    - Never called, or not always: the code of the module above takes the weight, as Mamba's does with `dt_proj` and, in
      its fused kernels, with `x_proj` and `out_proj`. An adapter on the layer would do nothing there.
    """
    found = []
    for path, module in model.named_modules():
        children = [name for name, child in module.named_children() if isinstance(child, torch.nn.Linear)]
        taken = weights_taken(type(module)) if children else frozenset()
        found += [f"{path}.{name}" for name in children if name in taken]
        if isinstance(module, torch.nn.Linear) and type(module).forward is not torch.nn.Linear.forward:
            weight = module.weight
            if weight.is_floating_point() and weight.shape == (module.out_features, module.in_features):
                try:
                    with torch.no_grad():
                        output = module(weight.new_zeros(1, module.in_features))
                except RuntimeError:  # DeepSeek V4's grouped layer takes rows of another shape
                    output = None
                if not torch.is_tensor(output) or output.shape != (1, module.out_features):
                    found.append(path)
    return found


@functools.cache
def weights_taken(kind: type) -> frozenset[str]:
    """The layers of a module whose whole weight its own code uses, for more than the dtype or the device."""
    try:
        code = inspect.getsource(kind)
    except (OSError, TypeError):  # there is no source
        return frozenset()
    return frozenset(re.findall(r"\bself\.(\w+)\.weight\b(?!\.(?:dtype|device|shape|size)|\[)", code))


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in `folder` that was written to its end, or None."""

    def whole(path: Path) -> bool:
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return True

    found = [p for p in folder.glob("checkpoint-*") if p.name.rpartition("-")[2].isdigit() and whole(p)]
    return max(found, key=lambda p: int(p.name.rpartition("-")[2]), default=None)


def save_weights(trainer: Any, folder: Path, base: str) -> None:
    """The adapter as PEFT saves it (or the whole model), with tokenizer and chat template beside it.

    `base` is what the adapter belongs on: the base model, or the parent run, which stock PEFT refuses to load rather
    than put the adapter on the wrong weights.
    """
    name = "model" if trainer.args.full_weights else "adapter"
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not trainer.args.full_weights:
        model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(folder / name)
    if name == "model":
        save_biases(model, folder / name)  # a lock on it is in no state dict
    trainer.processing_class.save_pretrained(folder / name)


def rehearse(trainer: Any, folder: Path, base: str) -> None:
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
        raise UsageError(f"{folder}: {error.strerror or error}; mend that, or choose another --output-dir") from error
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        way = "leave out --full-weights" if args.full_weights else "choose other --lora-targets"
        raise UsageError(
            f"the weights of {type(model).__name__} could not be saved at the end: {first}; mend that, or {way}"
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
    there = sum(p.stat().st_size for p in Path(args.output_dir).rglob("*") if p.is_file())  # of a run that is resumed
    kept = min(together, args.save_total_limit or together)
    needed = max(together * (weights + moments), kept * (weights + moments) + weights)
    hint = "lower --save-total-limit, pass --save-strategy no, or " if together else ""
    require_room(folder, max(0, needed - there), max([*sizes, moments if together else 0]), hint)


@contextmanager
def weighed() -> Iterator[list[int]]:
    """Inside, safetensors writes no file; the list receives the bytes that each would have."""
    import safetensors.torch

    original, sizes = safetensors.torch.serialize_file, []

    def weigh(tensors: dict[str, Any], *_: Any, **__: Any) -> None:
        sizes.append(sum(spec.data_len for spec in tensors.values()))

    safetensors.torch.serialize_file = weigh
    try:
        yield sizes
    finally:
        safetensors.torch.serialize_file = original


def checkpoints_together(trainer: Any) -> int:
    """How many checkpoints there are at once, at most: a new one is written before the oldest is removed."""
    args = trainer.args
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    steps_per_epoch = max(1, math.ceil(len(trainer.train_dataset) / batch))
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)
    every = {"no": math.inf, "epoch": steps_per_epoch}.get(
        str(getattr(args.save_strategy, "value", args.save_strategy)),
        args.save_steps if args.save_steps >= 1 else max(1, math.ceil(args.save_steps * steps)),
    )
    count = 0 if every == math.inf else math.ceil(steps / every)  # the last step is saved, too
    return min(count, args.save_total_limit + 1) if args.save_total_limit else count


def resolved(options: Any, config: Any) -> dict[str, Any]:
    """Every option of a run as plain values, without what says only where to write and how to start."""
    values = {**vars(options), **config.to_dict()}
    return {
        k: v
        for k, v in values.items()
        if k not in ("output_dir", "resume", "overwrite", "run_name", "resume_from_checkpoint")
    }


def final_loss(history: Sequence[dict]) -> float | None:
    """The last logged training loss."""
    return next((line["loss"] for line in reversed(history) if "loss" in line), None)
