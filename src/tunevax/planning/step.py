"""One training step of a method on a model without content: its peak memory by kind, and its arithmetic."""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.fx.experimental import _config
from transformers import AutoModelForCausalLM, TrainerCallback

from tunevax.errors import UsageError
from tunevax.modeling.loss import response_loss
from tunevax.modeling.quantization import require_quantization, scales_of, size_of
from tunevax.modeling.trainer import ResponseTrainer, TrainConfig
from tunevax.planning.trace import Trace

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from tunevax.modeling.method import MethodTrainer

fx_config: Any = _config  # its `patch` is put there at run time
KINDS = (
    "weights", "adapters", "optimiser", "gradients", "activations", "logits", "perturbations", "copies", "workspace",
)  # fmt: skip
FIELDS = {"chosen": "safety_data", "rejected": "safety_data", "task": "task_data", "validation": "validation_data"}
"""The parameter of a trainer that holds what it needs."""


@dataclass
class Prediction:
    """What a step needs."""

    peak: int  # bytes at the worst moment of a step in the middle of a run, as the allocator counts them
    kinds: dict[str, int]  # these bytes, by each of `KINDS`; `copies` are weights or features as before training
    forward: float = 0.0  # passes of the micro-batch through all blocks, recomputation included
    backward: float = 0.0  # likewise
    flops: float = 0.0  # floating-point operations of an optimiser step, a multiply-add being two
    trainable: int = 0  # numbers that train
    parameters: int = 0  # numbers in the model, without an adapter


def predict(
    trainer_class: type[MethodTrainer], args: TrainConfig, config: PreTrainedConfig, *, device: str = "cuda",
    dtype: torch.dtype | None = None, quantization: str | None = None, response_length: int | None = None,
) -> Prediction:  # fmt: skip
    """Run one step of a method on tensors without content.

    Args:
        args: the trainer's configuration; every row is `max_length` tokens long.
        device: where the step is to run, cuda or cpu: they have different kernels for attention.
        dtype: of the frozen weights; default the config's on cuda, float32 on cpu.
        quantization: of the linear layers in the blocks: None, nf4 or int8.
        response_length: tokens of a row that are its answer; default half of them.

    Raises `UsageError` as the trainer does, and for an optimiser whose state is not known here.
    """
    if (optim := getattr(args.optim, "value", args.optim)) != "adamw_torch_fused":
        raise UsageError(f"a plan knows fused AdamW only, which is the default, and --optim is {optim}; leave it out")
    if args.bf16 or args.fp16:
        raise UsageError("a plan does not know mixed precision; leave --bf16 and --fp16 out, and give --dtype instead")
    dtype = dtype_on(device, dtype, config)
    whole = args.gradient_accumulation_steps
    micro_batches = min(whole, 2)  # the second one meets the gradients of the first
    parts = args.plan_parts(micro_batches)
    with (
        tempfile.TemporaryDirectory() as folder,
        fx_config.patch(meta_nonzero_assume_all_nonzero=True),  # Surgery's heads that turn to the sink: all
        Trace(config.get_text_config().vocab_size, device) as trace,
    ):
        args = replace(
            args, output_dir=folder, gradient_accumulation_steps=micro_batches, save_strategy="no", eval_strategy="no",
            report_to="none", push_to_hub=False, dataloader_num_workers=0, dataloader_pin_memory=False, use_cpu=True,
            warmup_steps=0, **{"max_steps": 1, **parts.shorter},
        )  # fmt: skip
        trace.making = "copies"
        model = empty_model(config, dtype, quantization)
        trace.peak = 0  # a model is quantised layer by layer
        parameters = sum(size_of(p) for p in model.parameters())
        trainer = trainer_on(trainer_class, model, args, response_length or args.max_length // 2)
        trainer.for_plan()
        trace.making = None

        def create_optimizer(*_: object) -> Moments:
            rates = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
            trainer.optimizer = made = Moments(trainer.parameters, rates)
            return made

        step = trainer.training_step  # `Trainer` wants a loss on the device that it believes it is on
        vars(trainer).update(
            create_optimizer=create_optimizer, training_step=lambda *a, **k: (step(*a, **k), torch.zeros(()))[1]
        )
        counts = StepCounts(trainer, trace, parts.counts)
        trainer.add_callback(counts)
        with trace.watching(trainer.model):
            trainer.train()
    tokens = args.per_device_train_batch_size * args.max_length * len(trainer.blocks) * micro_batches
    forward, backward, flops = counts.counts.tolist()
    return Prediction(
        trace.peak, {kind: trace.at_peak.get(kind, 0) for kind in KINDS}, forward / tokens, backward / tokens,
        flops / micro_batches * whole, sum(p.numel() for p in trainer.parameters), parameters,
    )  # fmt: skip


def empty_model(config: PreTrainedConfig, dtype: torch.dtype, quantization: str | None = None) -> PreTrainedModel:
    """The model of a config, on `meta`: shapes without content."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if quantization is not None:
        require_quantization(quantization)  # before bitsandbytes is imported
        from tunevax.modeling.packing import quantize

        quantize(model, quantization)
    return model.eval()


def predict_forward(
    config: PreTrainedConfig, rows: int, length: int, *, dtype: torch.dtype | None = None, device: str = "cuda",
    quantization: str | None = None,
) -> Prediction:  # fmt: skip
    """One forward pass without a graph over `rows` of `length` tokens, its loss taken; no rows: the weights alone."""
    dtype = dtype_on(device, dtype, config)
    ids = torch.ones(rows, length, dtype=torch.long)
    with Trace(config.get_text_config().vocab_size, device) as trace, torch.no_grad():
        trace.making = "weights"
        model = empty_model(config, dtype, quantization)
        trace.making, trace.peak = None, 0
        trace.track(*model.parameters())  # looks at what is there, which may be all
        with trace.watching(model):
            if rows:
                response_loss(model, {"input_ids": ids, "attention_mask": ids, "labels": ids})
    return Prediction(
        trace.peak, {kind: trace.at_peak.get(kind, 0) for kind in KINDS}, forward=float(rows > 0), flops=trace.flops,
        parameters=sum(size_of(p) for p in model.parameters()),
    )  # fmt: skip


def scaled(trainer_class: type[MethodTrainer], args: TrainConfig, config: PreTrainedConfig, **where: Any) -> Prediction:
    """`predict` extrapolated from models of a few blocks: a step is linear in the depth, for some methods in the number
    of blocks that train too. Blocks may alternate, so even numbers are compared."""
    depth = config.get_text_config().num_hidden_layers
    parts = args.plan_parts(1)
    if depth <= 8 or not parts.linear:
        return predict(trainer_class, args, config, **where)

    def at(depth: int, blocks: int) -> np.ndarray:
        changes: dict[str, Any] = {parts.blocks: blocks} if parts.blocks else {}
        shallow = copy.deepcopy(config)
        text = shallow.get_text_config()
        text.num_hidden_layers = depth
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:depth]
        r = predict(trainer_class, replace(args, **changes), shallow, **where)
        passes = r.forward * depth, r.backward * depth
        return np.array([r.peak, *r.kinds.values(), *passes, r.flops, r.trainable, r.parameters])

    low, high = at(2, 1), at(4, 1)
    result = high + (high - low) / 2 * (depth - 4)
    if parts.blocks:
        result += (at(4, 3) - high) / 2 * (getattr(args, parts.blocks) - 1)
    peak, *kinds, forward, backward, flops, trainable, parameters = result.tolist()
    kinds = {kind: round(size) for kind, size in zip(KINDS, kinds, strict=True)}
    passes = forward / depth, backward / depth
    return Prediction(round(peak), kinds, *passes, flops, round(trainable), round(parameters))


def dtype_on(device: str, dtype: torch.dtype | None, config: PreTrainedConfig) -> torch.dtype:
    """Of the frozen weights, as `load` chooses it."""
    return dtype or (torch.float32 if device == "cpu" else getattr(config, "dtype", None) or torch.bfloat16)


def trainer_on(
    trainer_class: type[MethodTrainer], model: PreTrainedModel, args: TrainConfig, response_length: int
) -> ResponseTrainer:
    """A trainer on rows of `args.max_length` tokens, of which so many are the answer."""
    rows = rows_of(args, response_length)
    data: dict[str, Any] = {FIELDS[need]: rows for need in trainer_class.needs}
    if "safety_data" in data:
        data["safety_data"] = rows[: args.plan_parts(1).safety_rows]
    return trainer_class(model, args, **data, processing_class=made_up_tokenizer())


def rows_of(args: TrainConfig, response_length: int) -> list[dict[str, str]]:
    """Rows of words that are a token each, every answer ending in one more; different prompts, and two answers."""
    prompt = args.max_length - response_length
    if prompt < 1 or response_length < 2:
        raise UsageError(
            f"a row has {args.max_length} tokens, so its answer can have 2 to {args.max_length - 1}, not "
            f"{response_length}; change --response-length or --max-length"
        )
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    count = max(64, 10 * batch, args.plan_parts(1).rows)  # TAR holds out 1 in 5
    safe, harmful = (" ".join([word] * (response_length - 1)) for word in "cr")
    prompts = (" ".join([f"p{i % 256}", *["w"] * (prompt - 1)]) for i in range(count))
    return [{"prompt": p, "completion": safe, "chosen": safe, "rejected": harmful} for p in prompts]


def made_up_tokenizer() -> PreTrainedTokenizerBase:
    """A token for each word of `rows_of`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<end>", "w", "c", "r", *(f"p{i}" for i in range(256))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")
    made.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    return made


class Moments(torch.optim.Optimizer):
    """AdamW's state without its arithmetic, which on a GPU takes no memory of its own (one fused kernel)."""

    def step(self, closure: Callable | None = None) -> None:  # type: ignore[override]
        """Nothing."""


class StepCounts(TrainerCallback):
    """Gives the optimiser the state that it has in the middle of a run, and counts what the last step did: tokens
    through a block forward, and backward, and floating-point operations, with those of each of `parts` so often."""

    def __init__(self, trainer: ResponseTrainer, trace: Trace, parts: Mapping[str, float]) -> None:
        self.trainer, self.trace = trainer, trace
        self.before = self.counts = self.more = np.zeros(3)
        for name, times in parts.items():
            if hasattr(trainer, name):
                setattr(trainer, name, functools.partial(self.counted, getattr(trainer, name), times))

    def counted(self, part: Callable, times: float, *args: object) -> object:
        """What `part` gives; what it counts, counts so many times."""
        before = self.now()
        result = part(*args)
        self.more = self.more + (times - 1) * (self.now() - before)
        return result

    def now(self) -> np.ndarray:
        """The counts so far."""
        return np.array([*self.trace.passes, self.trace.flops], dtype=float)

    def on_train_begin(self, *_: object, **__: object) -> None:
        """Fill the optimiser's state, once the model is on its device."""
        model, kind = self.trainer.model, "weights" if self.trainer.args.full_weights else "adapters"
        self.trace.mark("weights", *model.parameters(), *model.buffers(), *scales_of(model))
        self.trace.mark(kind, *self.trainer.parameters)
        optimizer = self.trainer.optimizer
        state = getattr(optimizer, "optimizer", optimizer).state
        for parameter in self.trainer.with_state():
            state[parameter] = {name: torch.empty_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            self.trace.mark("optimiser", *state[parameter].values())

    def on_step_begin(self, *_: object, **__: object) -> None:
        """Start counting."""
        self.before, self.more = self.now(), np.zeros(3)

    def on_step_end(self, *_: object, **__: object) -> None:
        """Stop counting."""
        self.counts = self.now() - self.before + self.more
