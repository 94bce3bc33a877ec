"""Gradient similarity: rows whose gradients align with those of trusted rows, after LESS (arXiv 2402.04333).

    score(z) = max over categories c of  mean_{v in c} cos(P g(z), P g(v)),      g(z) = grad_LoRA of z's mean token loss

g is taken after a short warm-up of a fresh adapter on a random share of the pool; before it, B and A's gradient are 0.
P is a seeded random projection of g to `dimension` numbers. The validation rows of one category are one of LESS's
subtasks; without categories there is one.

Omitted from LESS: the sum over the checkpoints of the warm-up (only the last is used), and Adam's moments on the pool's
side, so the score is the influence on a step of plain gradient descent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from tunevax.console import bar
from tunevax.curation.curate import Pool
from tunevax.data.encoding import collate
from tunevax.errors import require
from tunevax.mixins import option
from tunevax.modeling.batches import encode_chosen
from tunevax.modeling.loss import response_loss
from tunevax.modeling.precision import wide
from tunevax.modeling.trainer import ProgressCallback, ResponseTrainer, TrainConfig

if TYPE_CHECKING:
    from peft import PeftModel

    from tunevax.modeling.loading import Loaded


@dataclass
class GradientSimilaritySelector:
    """Keeps rows whose gradient step would lower the loss of the validation rows."""

    output_dir: str | None = option(None, "the run folder to write")
    seed: int = option(42, "of the warm-up's rows, the adapter and the projection")
    warmup_share: float = option(0.05, "share of the pool the adapter is warmed up on")
    warmup_epochs: int = option(4, "passes of the warm-up over its share")
    learning_rate: float = option(1e-3, "of the warm-up")
    batch_size: int = option(10, "rows per step of the warm-up")
    dimension: int = option(8192, "numbers that a gradient is projected to")
    max_length: int = option(512, "tokens per row; longer answers are cut")
    needs: ClassVar[frozenset[str]] = frozenset({"model", "validation"})
    paper: ClassVar[str] = "arXiv 2402.04333"

    def __post_init__(self) -> None:
        require(self, "warmup_share", above=0, at_most=1)
        require(self, "warmup_epochs", "batch_size", "dimension", at_least=1)

    def plan_training(self) -> tuple[type, TrainConfig]:
        """What a plan estimates: the warm-up, which trains as SFT does."""
        from tunevax.alignment.sft import SFTConfig, SFTTrainer

        size = self.batch_size
        return SFTTrainer, SFTConfig(self.output_dir, max_length=self.max_length, per_device_train_batch_size=size)

    def score(self, pool: Pool) -> np.ndarray:
        """The cosine of each row with the validation rows of its closest category, [rows], in [-1, 1].

        Costs the warm-up, a pass per row of pool and validation, and memory for one projected gradient per row."""
        loaded = pool.load()
        rows = encode_chosen(pool.rows, loaded.model, loaded.tokenizer, self.max_length)
        trusted = encode_chosen(pool.validation, loaded.model, loaded.tokenizer, self.max_length)
        model, warmup = self.warmed_up(loaded, rows, str(pool.folder))
        passes = 1 + (len(trusted) + warmup * self.warmup_epochs) / len(rows)
        pool.passes.update(forward=passes, backward=passes)
        directions = row_gradients(model, rows + trusted, loaded.tokenizer.pad_token_id, self.dimension, self.seed)
        directions = torch.nn.functional.normalize(directions, dim=1)
        mine, theirs = directions[: len(rows)], directions[len(rows) :]
        categories = [row.get("category") for row in pool.validation]
        means = [theirs[[c == name for c in categories]].mean(0) for name in dict.fromkeys(categories)]
        return (mine @ torch.stack(means).T).amax(1).double().cpu().numpy()

    def warmed_up(self, loaded: Loaded, rows: Sequence[dict], folder: str) -> tuple[PeftModel, int]:
        """The model with an adapter trained on a random share of the rows (at least one batch), and their number."""
        count = min(len(rows), max(round(self.warmup_share * len(rows)), self.batch_size))
        drawn = np.random.RandomState(self.seed).choice(len(rows), count, replace=False)
        config = TrainConfig(
            folder, seed=self.seed, num_train_epochs=self.warmup_epochs, learning_rate=self.learning_rate,
            per_device_train_batch_size=self.batch_size, save_strategy="no", report_to="none",
        )  # fmt: skip
        progress = ProgressCallback("curate gradient-similarity: warm-up")
        trainer = ResponseTrainer(loaded.model, config, [rows[i] for i in drawn], loaded.tokenizer, [progress])
        trainer.train()
        return trainer.accelerator.unwrap_model(trainer.model).eval(), count


def row_gradients(
    model: PeftModel, rows: Sequence[dict[str, list[int]]], pad_token_id: int, dimension: int, seed: int
) -> torch.Tensor:
    """The projected gradient of each encoded row's mean token loss in the trainable weights, fp32 [rows, dimension];
    one row at a time, since some architectures mix the rows of a batch."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    device = parameters[0].device
    project = Projection(sum(p.numel() for p in parameters), dimension, seed, device)
    gradients = wide(parameters[0].new_empty(len(rows), dimension))
    with bar() as progress:
        task = progress.add_task("curate gradient-similarity", total=len(rows), note="")
        for i, row in enumerate(rows):
            inputs = {k: v.to(device) for k, v in collate([row], pad_token_id).items()}
            grads = torch.autograd.grad(response_loss(model, inputs), parameters, materialize_grads=True)
            gradients[i] = project(torch.cat([wide(g).flatten() for g in grads]))
            progress.advance(task)
    return gradients


class Projection:
    """Random signs, a random order, and the sum of every `dimension`-th number: a count sketch with equal buckets.

    The expected inner product of two projections is that of the vectors, as with a dense random matrix, which would
    hold 10^11 numbers for an adapter of a 7B model. This holds one index and one sign per number of the vector and adds
    in a fixed order, so the same seed gives the same bits. A vector shorter than `dimension` is only reordered.
    """

    def __init__(self, size: int, dimension: int, seed: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.order = torch.randperm(size, generator=generator, dtype=torch.int32).to(device)
        self.signs = (torch.randint(2, (size,), generator=generator, dtype=torch.int8) * 2 - 1).to(device)
        self.dimension, self.missing = dimension, -size % dimension

    def __call__(self, vector: torch.Tensor) -> torch.Tensor:
        """[size] to [dimension]."""
        mixed = vector.index_select(0, self.order) * self.signs
        return torch.nn.functional.pad(mixed, (0, self.missing)).view(-1, self.dimension).sum(0)
