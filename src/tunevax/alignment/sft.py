"""Supervised fine-tuning on safe answers: the reference point of every alignment method here.

    min_w  CE(prompt, chosen)

over a safety dataset, with a share of benign rows so that the model does not learn to refuse everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from tunevax.data.encoding import context_of, encode
from tunevax.data.mixing import mix
from tunevax.errors import UsageError
from tunevax.modeling.trainer import ResponseTrainer, TrainConfig


@dataclass
class SFTConfig(TrainConfig):
    """Alignment by supervised fine-tuning. Defaults: see `TrainConfig`."""

    task_share: float = field(
        default=0.5, metadata={"help": "share of benign rows among the alignment rows when --task-data is given"}
    )

    def __post_init__(self) -> None:
        if not 0 <= self.task_share < 1:
            raise UsageError(f"task_share is {self.task_share}; it must be at least 0 and below 1")
        super().__post_init__()


class SFTTrainer(ResponseTrainer):
    """Trains on `chosen` answers.

    Args:
        model: the model to align.
        args: the configuration.
        safety_data: rows with `prompt`, `chosen` and, for methods that need it, `rejected`.
        processing_class: the tokenizer, with a chat template.
        task_data: benign rows with `prompt` and `completion`, mixed in at `args.task_share`.

    Raises:
        UsageError: the method needs `rejected` and a row lacks it; a prompt does not fit `args.max_length`.
    """

    config_class = SFTConfig
    paper = ""
    needs_rejected = False
    off: ClassVar[dict[str, Any] | None] = {}
    """Options with which the method trains what SFT trains, bit for bit; None if it never does."""

    def __init__(
        self,
        model: Any,
        args: SFTConfig,
        safety_data: Sequence[dict],
        processing_class: Any,
        task_data: Sequence[dict] | None = None,
        callbacks: list | None = None,
    ) -> None:
        rows = [{**row, "completion": row["chosen"]} for row in safety_data]
        if task_data and args.task_share > 0:
            rows = mix(
                task_data,
                rows,
                ratio=1 - args.task_share,
                size=round(len(rows) / (1 - args.task_share)),
                seed=args.seed,
            )
        encoded = self.encode_rows(rows, processing_class, args, context_of(model))
        super().__init__(model, args, encoded, processing_class, callbacks)

    def encode_rows(self, rows: list[dict], tokenizer: Any, args: SFTConfig, context: int | None) -> list[dict]:
        """The rows of the training set, with `completion` what is trained on, as token ids and labels."""
        return encode(rows, tokenizer, args.max_length, loss_on=args.loss_on, context=context)

    def cost(self) -> float:
        """Compute of a step, in SFT steps of the same batch, the mean over the run so far. A method that runs the
        blocks more often says so here."""
        return 1.0

    def updates(self) -> float:
        """How many updates a block got in the run so far, the mean over blocks. A method that trains some of them at a
        time says so here."""
        return float(self.state.global_step)
