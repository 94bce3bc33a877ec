"""One pass of a model over rows, in batches of similar length, without a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from tunevax.console import bar
from tunevax.data.encoding import collate, context_of, encode
from tunevax.errors import UsageError
from tunevax.modeling.hooks import still
from tunevax.modeling.loss import row_losses
from tunevax.modeling.precision import wide
from tunevax.records import Example

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """The model in evaluation mode and without a graph; as it was before, afterwards."""
    with still(model), torch.inference_mode():
        yield


def encode_chosen(
    rows: Sequence[Example], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[dict[str, list[int]]]:
    """Rows with `chosen` as the answer, as token ids and labels."""
    return encode(rows, tokenizer, max_length, context=context_of(model), answer="chosen")


def padded(
    tokenizer: PreTrainedTokenizerBase, encoded: BatchEncoding, size: int, device: torch.device
) -> Iterator[tuple[list[int], BatchEncoding]]:
    """(indices, padded batch) of a tokenizer's output, longest first, so that memory runs out at once or never."""
    order = sorted(range(len(encoded["input_ids"])), key=lambda i: -len(encoded["input_ids"][i]))
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        batch = {name: [column[i] for i in rows] for name, column in encoded.items()}
        yield rows, tokenizer.pad(batch, padding=True, return_tensors="pt").to(device)


def collated(
    rows: Sequence[dict[str, list[int]]], pad_token_id: int, batch_size: int, device: torch.device,
    longest_first: bool = True,
) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:  # fmt: skip
    """(indices, batch on `device`) of encoded rows, each batch of similar length; the longest first, or last."""
    order = sorted(range(len(rows)), key=lambda i: (-1 if longest_first else 1) * len(rows[i]["input_ids"]))
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        yield part, {k: v.to(device) for k, v in collate([rows[i] for i in part], pad_token_id).items()}


def losses_of(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean cross entropy of each row over its labels, fp32 [rows], in nats; for `by_batch`."""
    return row_losses(model, inputs)[1]


def by_batch(
    model: nn.Module, rows: Sequence[dict[str, list[int]]], pad_token_id: int, batch_size: int,
    compute: Callable[[nn.Module, dict[str, torch.Tensor]], torch.Tensor], label: str,
) -> np.ndarray:  # fmt: skip
    """`compute(model, inputs)` of every encoded row, fp32 [rows, ...] in the order given; no graph, no dropout. The
    longest rows go first; the progress bar is called `label`."""
    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}; it must be at least 1")
    order: list[int] = []
    results: list[torch.Tensor] = []
    with evaluating(model), bar() as progress:
        task = progress.add_task(f"curate {label}", total=len(rows), note="")
        for part, inputs in collated(rows, pad_token_id, batch_size, next(model.parameters()).device):
            order += part
            results.append(wide(compute(model, inputs)).cpu())
            progress.advance(task, len(part))
    return torch.cat(results)[np.argsort(order)].numpy()
