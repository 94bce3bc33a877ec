"""What every method of alignment and of fine-tuning is: a trainer on safety rows, on task rows, or on both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from tunevax.data.chat import Answer
from tunevax.data.encoding import context_of, encode
from tunevax.data.safety import require_rows
from tunevax.errors import UsageError
from tunevax.methods import name_of
from tunevax.modeling.trainer import Items, ResponseTrainer, TrainConfig
from tunevax.records import Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback


class MethodTrainer(ResponseTrainer):
    """A method: the data it needs, the rows it trains on and, in a subclass, its step.

    Args:
        model: the model to train; it gets a fresh LoRA adapter unless it comes with one or `args.full_weights`.
        safety_data: rows with `prompt` and the answers, `chosen` and `rejected`, that `needs` names.
        task_data: rows with `prompt` and `completion`: a publisher's benign rows, or a customer's job.
        processing_class: the tokenizer, with a chat template.

    Raises `UsageError` if data that `needs` names is missing, a prompt leaves no room for an answer, or the model lacks
    parts that the method works on.
    """

    config_class: ClassVar[type[TrainConfig]] = TrainConfig  # the dataclass of its options
    paper: ClassVar[str] = ""  # where it was published, for example `arXiv 2410.09760`
    needs: ClassVar[frozenset[str]] = frozenset()  # the data that must be there, of `NEEDS` in `tunevax.methods`
    off: ClassVar[dict[str, Any] | None] = {}  # with these it trains what SFT trains, bit for bit; None: never
    different: ClassVar[bool] = False  # the two answers of a safety row must differ
    compares: ClassVar[bool] = False  # it compares with the model without its adapter, so that it trains a fresh one
    whole: torch.Tensor | None = None  # what `counted` counts in the whole batch, of all micro-batches and ranks

    def __init__(
        self, model: PreTrainedModel, args: TrainConfig, *, safety_data: Sequence[Example] | None = None,
        task_data: Sequence[Example] | None = None, processing_class: PreTrainedTokenizerBase,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:  # fmt: skip
        require_rows(self.needs, safety_data, task_data, name_of(type(self)), self.different)
        if self.compares and hasattr(model, "peft_config"):
            raise UsageError(
                f"{name_of(type(self))} compares with the model without its adapter, and this one comes with an "
                "adapter; merge it first"
            )
        self.safety_data, self.task_data = list(safety_data or ()), list(task_data or ())
        self.args, self.processing_class, self.context = args, processing_class, context_of(model)
        super().__init__(model, args, self.encode_rows(self.training_rows()), processing_class, callbacks)
        self.prepare()

    def training_rows(self) -> list[Example]:
        """The rows of the training set: `prompt`, and in `completion` what is trained on."""
        raise NotImplementedError

    def encode_rows(self, rows: Sequence[Example]) -> list[dict[str, Any]]:
        """The rows of the training set as token ids and labels."""
        return encode(rows, self.processing_class, self.args.max_length, self.args.loss_on, self.context)

    def encode_answers(self, rows: Sequence[Example], answer: Answer) -> list[dict[str, Any]]:
        """Safety rows with their answer `chosen` or `rejected` as token ids and labels; the loss is on the response."""
        return encode(rows, self.processing_class, self.args.max_length, context=self.context, answer=answer)

    def prepare(self) -> None:
        """What a method does once, when model and training set are ready."""

    def counted(self, batch: dict[str, torch.Tensor]) -> torch.Tensor | None:
        """The denominators of a method's means in one micro-batch, as a vector of counts; None if it has none."""
        return None

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, torch.Tensor]], Items]:
        """As the base; sets `whole`."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = [count for batch in batches if (count := self.counted(batch)) is not None]
        self.whole = torch.stack(counts).sum(0).to(device) if counts else None
        if self.whole is not None and self.args.average_tokens_across_devices:  # as `loss_scale` expects
            self.whole = self.accelerator.reduce(self.whole, "sum")
        return batches, items

    def cost(self) -> float:
        """Mean compute of a step over the run so far, in SFT steps of the same batch."""
        return 1.0

    def updates(self) -> float:
        """How many updates a block got in the run so far, the mean over blocks."""
        return float(self.state.global_step)
