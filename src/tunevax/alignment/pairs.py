"""Paired batches: with the safe answer to a prompt comes the harmful answer to the same prompt, row for row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from tunevax.alignment.sft import SFTTrainer
from tunevax.data.encoding import collate
from tunevax.modeling.trainer import Items
from tunevax.records import Example


class PairTrainer(SFTTrainer):
    """The ground of methods that learn from pairs. A batch has, beside what SFT has (`input_ids`, `attention_mask`,
    `labels`, each [rows, tokens]), the same with `rejected_` in front, [pairs, tokens], of equal width, and `pairs`,
    the row that each of these belongs to. Benign rows have no pair: a batch may have fewer pairs than rows, or none.
    """

    needs = frozenset({"chosen", "rejected"})
    different = True
    kept: ClassVar[tuple[str, ...]] = ("seen",)

    def prepare(self) -> None:
        """Batches have pairs."""
        self.data_collator = lambda rows: collate_pairs(rows, self.processing_class.pad_token_id)
        self.seen = [0, 0, 0, 0]  # so far: tokens of rows and of their pairs, labels of rows and of their pairs

    def encode_rows(self, rows: Sequence[Example]) -> list[dict[str, Any]]:
        """As SFT, the rows of the safety data with their pair under `rejected`."""
        encoded = super().encode_rows(rows)
        places = [i for i, row in enumerate(rows) if "chosen" in row]
        for i, pair in zip(places, self.encode_answers([rows[i] for i in places], "rejected"), strict=True):
            encoded[i]["rejected"] = pair
        return encoded

    def training_step(self, model: nn.Module, inputs: dict, num_items_in_batch: Items = None) -> torch.Tensor:
        """As the base; counts tokens, for `cost`."""
        inputs = self._prepare_inputs(inputs)
        tokens = [inputs[k].sum() for k in ("attention_mask", "rejected_attention_mask")]
        labels = [(inputs[k][:, 1:] != -100).sum() for k in ("labels", "rejected_labels")]
        self.seen = [a + b for a, b in zip(self.seen, torch.stack(tokens + labels).tolist(), strict=True)]
        return super().training_step(model, inputs, num_items_in_batch)


def collate_pairs(rows: list[dict], pad_token_id: int) -> dict[str, Any]:
    """Encoded rows, some with `rejected`, as the tensors of a paired batch."""
    pairs = [i for i, row in enumerate(rows) if "rejected" in row]
    both = collate([*rows, *(rows[i]["rejected"] for i in pairs)], pad_token_id)
    safe = {k: v[: len(rows)] for k, v in both.items()}
    return {**safe, **{f"rejected_{k}": v[len(rows) :] for k, v in both.items()}, "pairs": torch.tensor(pairs).long()}


def joined(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The rows and then their pairs as the input of one forward, [rows + pairs, tokens].

    One forward through the wrapped model and not two: DDP must see every parameter's gradient once.
    """
    return {k: torch.cat([inputs[k], inputs[f"rejected_{k}"]]) for k in ("input_ids", "attention_mask")}
