"""Further rows for a training step, drawn by a generator of their own that a checkpoint can hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from tunevax.data.encoding import collate
from tunevax.errors import UsageError

if TYPE_CHECKING:
    from tunevax.modeling.trainer import ResponseTrainer


class Draws:
    """Batches of further rows for the optimiser steps of a trainer, from a separate generator: the order of the
    trainer's own rows does not change. Every process draws the same rows and takes its share."""

    def __init__(self, seed: int) -> None:
        # RandomState: its stream is frozen by numpy's policy, so a seed means the same rows in every version.
        self.generator = np.random.RandomState(seed)

    def require(self, trainer: ResponseTrainer, rows: int, what: str) -> None:
        """Raise `UsageError` if there are fewer rows than an optimiser step takes."""
        args = trainer.args
        need = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        if rows < need:
            raise UsageError(
                f"there are {rows} {what} and a step takes {need}; lower --per-device-train-batch-size, or give more"
            )

    def indices(self, trainer: ResponseTrainer, rows: int) -> list[list[int]]:
        """The rows of this process in this optimiser step, drawn without replacement; one list per micro-batch."""
        size, world = trainer.args.per_device_train_batch_size, trainer.args.world_size
        parts = trainer.current_gradient_accumulation_steps
        drawn = self.generator.choice(rows, size * parts * world, replace=False)
        return drawn.reshape(world, parts, size)[trainer.args.process_index].tolist()

    def batches(self, trainer: ResponseTrainer, rows: Sequence[dict]) -> list[dict[str, torch.Tensor]]:
        """A batch of the size of the optimiser step's own, as micro-batches on the device."""
        return [collated(trainer, [rows[i] for i in part]) for part in self.indices(trainer, len(rows))]

    def state(self) -> list:
        """As JSON values."""
        kind, keys, *rest = self.generator.get_state(legacy=True)
        return [kind, np.asarray(keys).tolist(), *rest]

    def load(self, state: list) -> None:
        """Restore what `state` returned."""
        kind, keys, *rest = state
        self.generator.set_state((kind, np.array(keys, dtype=np.uint32), *rest))


def noise_generator(trainer: ResponseTrainer, number: int, device: torch.device) -> torch.Generator:
    """A generator for the noise of one micro-batch of one process, seeded by its number: dropout masks do not depend on
    it, and a resumed run continues exactly."""
    key = (trainer.args.seed, trainer.args.process_index, number)
    generator = torch.Generator(device)
    generator.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))
    return generator


def collated(trainer: ResponseTrainer, rows: Sequence[dict]) -> dict[str, torch.Tensor]:
    """Encoded rows as tensors on the device, [batch, tokens]."""
    return trainer._prepare_inputs(collate(rows, trainer.processing_class.pad_token_id))
