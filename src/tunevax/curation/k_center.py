"""k-center: the core set that covers the pool (arXiv 1708.00489, algorithm 1).

    u = argmax_i min_{j in S} ||e_i - e_j||,   S <- S + {u}

over all rows, with e the mean of the model's last hidden states over the tokens of the safe answer, given its prompt.
The paper starts from the labelled rows; here S starts with the row closest to the mean of all. k-center covers the pool
and does not assess its rows: a corrupted row far from the others is chosen early.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from tunevax.console import bar
from tunevax.curation.curate import ForwardOptions, Pool
from tunevax.modeling.batches import by_batch, encode_chosen
from tunevax.modeling.loss import last_hidden
from tunevax.modeling.precision import wide


@dataclass
class KCenterSelector(ForwardOptions):
    """Keeps rows whose answers, as the model represents them, lie far from each other."""

    paper: ClassVar[str] = "arXiv 1708.00489"

    def score(self, pool: Pool) -> np.ndarray:
        """Minus the turn at which each row is chosen, [rows], from 0."""
        model, tokenizer, _ = pool.load()
        pool.passes.update(forward=1.0, backward=0.0)
        rows = encode_chosen(pool.rows, model, tokenizer, self.max_length)
        device = next(model.parameters()).device
        points = by_batch(model, rows, tokenizer.pad_token_id, self.batch_size, embeddings, "k-center")
        scores = np.empty(len(rows))
        scores[farthest_first(torch.from_numpy(points).to(device))] = -np.arange(len(rows))
        return scores


def embeddings(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The mean of the head's inputs over the labelled tokens of each row, fp32 [rows, hidden]."""
    hidden = last_hidden(model, {k: v for k, v in inputs.items() if k != "labels"})
    masks = inputs["labels"] != -100
    return torch.stack([wide(row[mask]).mean(0) for row, mask in zip(hidden, masks, strict=True)])


def farthest_first(points: torch.Tensor) -> list[int]:
    """The order in which all rows of `points` [rows, dim] become centres; of equals the first. O(rows^2 dim) time."""
    order = [int((-(points - points.mean(0)).square().sum(1)).argmax())]
    nearest = points.new_full((len(points),), torch.inf)
    with bar() as progress:
        task = progress.add_task("curate k-center: choose", total=len(points), completed=1, note="")
        while len(order) < len(points):
            # By differences, not products: duplicates are then at exactly 0, and ties are ties.
            nearest = torch.minimum(nearest, (points - points[order[-1]]).square().sum(1))
            nearest[order] = -1.0
            order.append(int(nearest.argmax()))
            progress.advance(task)
    return order
