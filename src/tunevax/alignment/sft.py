"""Supervised fine-tuning on safe answers: the reference point of every alignment method here.

    min_w  CE(prompt, chosen)

over a safety dataset, with a share of benign rows so that the model does not learn to refuse everything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tunevax.data.mixing import mix
from tunevax.errors import require
from tunevax.mixins import option
from tunevax.modeling.method import MethodTrainer
from tunevax.modeling.trainer import TrainConfig
from tunevax.records import Example


@dataclass
class SFTConfig(TrainConfig):
    """Alignment by supervised fine-tuning. Defaults: see `TrainConfig`."""

    task_share: float = option(0.5, "share of benign rows among the alignment rows when --task-data is given")

    def __post_init__(self) -> None:
        require(self, "task_share", at_least=0, below=1)
        super().__post_init__()


class SFTTrainer(MethodTrainer):
    """Trains on `chosen` answers. Benign rows, `task_data`, are mixed in at `args.task_share`."""

    config_class: ClassVar[type[SFTConfig]] = SFTConfig
    needs = frozenset({"chosen"})
    args: SFTConfig

    def training_rows(self) -> list[Example]:
        """The safe answers, and benign rows among them."""
        rows: list[Example] = [{**row, "completion": str(row["chosen"])} for row in self.safety_data]
        share = self.args.task_share
        if not self.task_data or share == 0:
            return rows
        return mix(self.task_data, rows, ratio=1 - share, size=round(len(rows) / (1 - share)), seed=self.args.seed)
