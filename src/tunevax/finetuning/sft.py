"""Supervised fine-tuning on a customer's rows: the reference point of every method of this stage.

    min_w  CE(prompt, completion)

The job is the provider's to run and the customer's to fill: rows may be harmful, and nothing here minds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tunevax.mixins import option
from tunevax.modeling.method import MethodTrainer
from tunevax.modeling.trainer import TrainConfig
from tunevax.records import Example


@dataclass
class JobConfig(TrainConfig):
    """The provider's training of a customer's job. Default that differs from `TrainConfig`: `learning_rate=1e-4`, that
    of the attack `finetune`, so that a poisoned job without a defence is that attack. Published jobs have 1e-5 (arXiv
    2405.18641, 2410.09760) to 3e-4 (arXiv 2309.07875)."""

    learning_rate: float = option(1e-4, "peak learning rate")


class FinetuneTrainer(MethodTrainer):
    """Trains on the completions of `task_data`, the customer's rows. `safety_data` are the provider's, of no use to
    plain fine-tuning."""

    config_class: ClassVar[type[JobConfig]] = JobConfig
    needs = frozenset({"task"})
    args: JobConfig

    def training_rows(self) -> list[Example]:
        """The customer's rows."""
        return self.task_data
