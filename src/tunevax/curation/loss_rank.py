"""Loss rank: the small-loss rule of learning from noisy labels (as in Co-teaching, arXiv 1804.06872).

    score(x, y) = -1/|y| sum_t -log p(y_t | x, y_<t)

of the safe answer y under the model given: what the model finds unlikely is taken for a wrong label. The model counts.
A base model finds refusals unlikely and would drop just the rows that teach something; the rule suits an aligned one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch

from tunevax.data.encoding import collate, context_of, encode
from tunevax.errors import UsageError
from tunevax.modeling.loss import row_losses
from tunevax.modeling.precision import wide
from tunevax.modeling.progress import bar
from tunevax.scoring.generation import evaluating


@dataclass
class LossRankSelector:
    """Keeps the rows whose safe answer the model finds likely."""

    output_dir: str | None = field(default=None, metadata={"help": "the run folder to write"})
    seed: int = field(default=42, metadata={"help": "recorded; nothing here is random"})
    batch_size: int = field(default=16, metadata={"help": "rows per forward pass; changes the speed only"})
    max_length: int = field(default=512, metadata={"help": "tokens per row; longer answers are cut"})

    needs: ClassVar[frozenset[str]] = frozenset({"model"})
    paper: ClassVar[str] = "arXiv 1804.06872"

    def score(self, pool: Any) -> np.ndarray:
        """Minus the mean cross entropy of each row's `chosen`, in nats per token, [rows]."""
        model, tokenizer, _ = pool.load()
        pool.passes.update(forward=1.0, backward=0.0)
        rows = encode_chosen(pool.rows, model, tokenizer, self.max_length)
        return -by_batch(model, rows, tokenizer.pad_token_id, self.batch_size, losses_of, "loss-rank").astype(float)


def encode_chosen(rows: Sequence[dict], model: Any, tokenizer: Any, max_length: int) -> list[dict[str, list[int]]]:
    """The rows as `encode` gives them, with `chosen` as the answer."""
    return encode([{**r, "completion": r["chosen"]} for r in rows], tokenizer, max_length, context=context_of(model))


def losses_of(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean cross entropy of each row over its labels, fp32 [rows], in nats; for `by_batch`."""
    return row_losses(model, inputs)[1]


def by_batch(
    model: Any,
    rows: Sequence[dict[str, list[int]]],
    pad_token_id: int,
    batch_size: int,
    compute: Callable[[Any, dict[str, torch.Tensor]], torch.Tensor],
    label: str,
) -> np.ndarray:
    """`compute(model, inputs)` of every encoded row, fp32 [rows, ...] in the order given; no graph, no dropout.

    Batches are of rows of similar length, longest first; the progress bar is called `label`.
    """
    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}; it must be at least 1")
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
    device = next(model.parameters()).device
    found: list[torch.Tensor] = []
    with evaluating(model), bar() as progress:
        task = progress.add_task(f"curate {label}", total=len(order), note="")
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            inputs = {k: v.to(device) for k, v in collate([rows[i] for i in part], pad_token_id).items()}
            found.append(wide(compute(model, inputs)).cpu())
            progress.advance(task, len(part))
    return torch.cat(found)[np.argsort(order)].numpy()
