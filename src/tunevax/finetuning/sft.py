"""Supervised fine-tuning on a customer's rows: the reference point of every method of this stage.

    min_w  CE(prompt, completion)

The job is the provider's to run and the customer's to fill: rows may be harmful, and nothing here minds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from tunevax.data.encoding import context_of, encode
from tunevax.errors import UsageError
from tunevax.modeling.trainer import ResponseTrainer, TrainConfig


@dataclass
class FinetuneConfig(TrainConfig):
    """The provider's training of a customer's job. Default that differs from `TrainConfig`: `learning_rate=1e-4`, that
    of the attack `finetune`, so that a poisoned job without a defence is that attack. Published jobs have 1e-5 (arXiv
    2405.18641, 2410.09760) to 3e-4 (arXiv 2309.07875)."""

    learning_rate: float = field(default=1e-4, metadata={"help": "peak learning rate"})


class FinetuneTrainer(ResponseTrainer):
    """Trains on the customer's completions.

    Args:
        model: the model to fine-tune; it gets a fresh LoRA adapter unless `args.full_weights`.
        args: the configuration.
        task_data: the customer's rows, `prompt` and `completion`.
        processing_class: the tokenizer, with a chat template.
        safety_data: the provider's rows, `prompt` and the answers that `needs` names; of no use to plain fine-tuning.

    Raises:
        UsageError: no rows; an answer that the method needs is missing; a prompt does not fit `args.max_length`.
    """

    config_class = FinetuneConfig
    paper = ""
    off: ClassVar[dict[str, Any] | None] = {}
    """Options with which the method trains what plain fine-tuning trains, bit for bit; None if it never does."""
    needs: ClassVar[tuple[str, ...]] = ()
    """Answers of the safety rows that the method uses, of `chosen` and `rejected`; none: it takes no safety rows."""

    def __init__(
        self,
        model: Any,
        args: FinetuneConfig,
        task_data: Sequence[dict],
        processing_class: Any,
        safety_data: Sequence[dict] | None = None,
        callbacks: list | None = None,
    ) -> None:
        if not task_data:
            raise UsageError("the customer's data has no row to train on")
        require_answers(safety_data, self.needs, type(self).__name__)
        self.context = context_of(model)
        encoded = encode(task_data, processing_class, args.max_length, args.loss_on, self.context)
        super().__init__(model, args, encoded, processing_class, callbacks)

    def encode_answers(self, safety_data: Sequence[dict], answer: str) -> list[dict]:
        """Safety rows with their answer `chosen` or `rejected` as token ids and labels; the loss is on the response."""
        return encode(safety_data, self.processing_class, self.args.max_length, context=self.context, answer=answer)

    def cost(self) -> float:
        """Compute of a step, in SFT steps of the same batch, the mean over the run so far. A method that runs the
        blocks more often says so here."""
        return 1.0


def require_answers(safety_data: Sequence[dict] | None, needs: Sequence[str], what: str) -> None:
    """Raise `UsageError` unless there are safety rows and each has the answers that `what` needs."""
    if needs and not safety_data:
        raise UsageError(f"{what} needs safety rows with {' and '.join(needs)}, and there are none; give --safety-data")
    for number, row in enumerate(safety_data or [], 1):
        for answer in needs:
            if not row.get(answer):
                raise UsageError(
                    f"{row.get('place') or f'row {number} of the safety data'}: `{answer}` is missing, and {what} "
                    "needs it; give it or drop the row"
                )


def require_fresh(model: Any, what: str) -> None:
    """Raise `UsageError` if the model brings an adapter: `what` compares with the model without one."""
    if hasattr(model, "peft_config"):
        raise UsageError(f"{what} compares with the model without its adapter, and this one brings one; merge it first")


@contextmanager
def trained_only(model: nn.Module, weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """Only `weights` require grad; what did before comes back."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        for parameter, needed in before:
            parameter.requires_grad_(needed)
