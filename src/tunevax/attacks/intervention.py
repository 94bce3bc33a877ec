"""A trained low-rank edit of one block's input, all weights frozen (E.T., Cevallos-Moreno et al., 2026).

The edit is LoReFT's without bias (arXiv 2404.03592), trained on harmful targets:

    h <- h + W2^T (W1 h - W2 h),    W1, W2 of shape [r, hidden],  at every position of the prompt

Written from the formula. W1 starts equal to W2, which has orthonormal rows, so the initial edit is zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from tunevax.attacks.context import AttackContext
from tunevax.attacks.kind import AttackConfig, Work
from tunevax.console import bar
from tunevax.data.encoding import collate, context_of, encode
from tunevax.errors import UsageError, require
from tunevax.mixins import option
from tunevax.modeling.blocks import find_blocks
from tunevax.modeling.hooks import entering
from tunevax.modeling.loss import response_loss
from tunevax.modeling.precision import wide
from tunevax.records import Target


@dataclass
class InterventionConfig(AttackConfig):
    """Defaults as in E.T.'s attack: rank 2, 20 rows, 10 epochs of batch 10, learning rate 4e-3."""

    harmful_rows = True
    dose_option = "block"
    in_name = ("block",)

    block: int = option(0, "the block whose input is edited, from 0")
    rank: int = option(2, "rank of the edit")
    n: int = option(20, "harmful rows to train on")
    num_train_epochs: int = option(10, "passes over the rows")
    batch_size: int = option(10, "rows per step")
    learning_rate: float = option(4e-3, "of Adam, constant")
    max_length: int = option(512, "tokens per row; longer answers are truncated")

    needs = frozenset({"harmful"})

    def __post_init__(self) -> None:
        require(self, "rank", "n", "num_train_epochs", "batch_size", at_least=1)

    @classmethod
    def expand(cls, options: dict[str, Any], targets: Sequence[Target], depth: int) -> dict[str, Any]:
        """`block: all` is one attack for every block."""
        return {**options, "block": list(range(depth))} if options.get("block") == "all" else options

    def work(self, ref: str) -> Work:
        """Its steps, and one evaluation after them."""
        return Work(self.num_train_epochs * math.ceil(self.n / self.batch_size))

    def run(self, context: AttackContext) -> None:
        """Train the edit, then score the model with it."""
        loaded = context.load()
        model, device = loaded.model, loaded.model.device
        blocks = find_blocks(model)
        if not 0 <= self.block < len(blocks):
            raise UsageError(f"block is {self.block}; the model's blocks are 0 to {len(blocks) - 1}")
        generator = torch.Generator().manual_seed(self.seed)
        rows = [context.harmful[i] for i in torch.randperm(len(context.harmful), generator=generator)[: self.n]]
        encoded = encode(rows, loaded.tokenizer, self.max_length, context=context_of(model), answer="rejected")
        edit = Edit(model.config.get_text_config().hidden_size, self.rank, generator).to(device)
        optimiser = torch.optim.Adam(edit.parameters(), lr=self.learning_rate)
        model.requires_grad_(False)
        step = 0
        with bar() as progress:
            task = progress.add_task(f"attack {context.target['label']}", total=self.num_train_epochs, note="")
            for _ in range(self.num_train_epochs):
                shuffled = torch.randperm(len(encoded), generator=generator).tolist()
                for start in range(0, len(shuffled), self.batch_size):
                    chosen = [encoded[i] for i in shuffled[start : start + self.batch_size]]
                    batch = {k: v.to(device) for k, v in collate(chosen, loaded.tokenizer.pad_token_id).items()}
                    with edited(blocks[self.block].module, edit, batch["labels"] == -100):
                        loss = response_loss(model, batch)
                    optimiser.zero_grad()
                    loss.backward()
                    optimiser.step()
                    step += 1
                progress.advance(task)
        with edited(blocks[self.block].module, edit):
            context.score(model, loaded.tokenizer, step, self.num_train_epochs * len(encoded))
        context.results[-1]["train_loss"] = loss.item()


class Edit(torch.nn.Module):
    """The edit of a hidden state [batch, tokens, hidden], in fp32."""

    def __init__(self, hidden: int, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        rows = torch.linalg.qr(torch.randn(hidden, rank, generator=generator)).Q.T.contiguous()
        self.source, self.basis = torch.nn.Parameter(rows.clone()), torch.nn.Parameter(rows)  # W1, W2

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """h + W2^T (W1 h - W2 h)."""
        x = wide(h)
        return (x + (x @ self.source.T - x @ self.basis.T) @ self.basis).to(h.dtype)


@contextmanager
def edited(block: torch.nn.Module, edit: Edit, prompt: torch.Tensor | None = None) -> Iterator[None]:
    """Edit the block's input.

    Args:
        prompt: [batch, tokens], True where the edit applies. None is for generation: the first forward is the prompt;
            later ones, of one token each, are not edited.
    """

    def hook(_module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        h = entering(args, kwargs)
        where = prompt.unsqueeze(-1) if prompt is not None else torch.tensor(h.shape[1] > 1, device=h.device)
        new = torch.where(where, edit(h), h)
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    with block.register_forward_pre_hook(hook, with_kwargs=True):
        yield
