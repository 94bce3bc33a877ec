"""LDIFS: fine-tuning near the features of the model it starts from (Mukhoti et al., arXiv 2308.13320).

    L = CE(customer) + lamb * 1/L sum_l mean_{b, t} ||h_l - h0_l||^2 / d

with h_l the residual stream after block l, of L blocks and d dimensions, over all tokens that are not padding, and h0
the same in the model before fine-tuning, which is this model with its adapter switched off.

The paper's features are L2-normalised ones of a vision model; a port to language models in released code adds a term
only while it is small, and so is plain fine-tuning beyond that. This is the mean square, at every depth and size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from tunevax.errors import UsageError, require
from tunevax.finetuning.sft import FinetuneTrainer, JobConfig
from tunevax.mixins import option
from tunevax.modeling.hooks import capture, still
from tunevax.modeling.loss import last_hidden
from tunevax.modeling.precision import wide
from tunevax.modeling.trainer import Items


@dataclass
class LDIFSConfig(JobConfig):
    """Configuration of LDIFS; the rest as in `JobConfig`. The scale of hidden states differs from model to model,
    so lamb needs a search, over 1e-2 to 1e2 or so."""

    lamb: float = option(1.0, "weight of the distance to the features before fine-tuning")

    def __post_init__(self) -> None:
        require(self, "lamb", at_least=0)
        if self.full_weights:
            raise UsageError(
                "ldifs compares with the model without its adapter, so it needs one; leave out --full-weights"
            )
        super().__post_init__()


class LDIFSTrainer(FinetuneTrainer):
    """Fine-tuning with a penalty on how far hidden states move."""

    config_class = LDIFSConfig
    paper = "arXiv 2308.13320"
    off = {"lamb": 0}
    compares = True
    args: LDIFSConfig

    def parts(self) -> tuple[str, ...]:
        """The output of each block."""
        return ("module",) if self.args.lamb else ()

    def counted(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The tokens, which the mean is over."""
        return batch["attention_mask"].sum()[None]

    def compute_loss(
        self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch: Items = None
    ) -> torch.Tensor:
        """Cross entropy, and this micro-batch's share of the distance."""
        if self.args.lamb == 0:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        reference = self.reference(inputs)
        with capture({i: b.module for i, b in enumerate(self.blocks)}) as hidden:
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        mask = inputs["attention_mask"].bool()
        squares = [(wide(hidden[i][mask]) - wide(h[mask])).square().mean(-1).sum() for i, h in reference.items()]
        total = mask.sum() if self.whole is None else self.whole.item()
        distance = torch.stack(squares).mean() / total * self.loss_scale(num_items_in_batch)
        self.note(distance=distance.detach() * self.current_gradient_accumulation_steps)
        return loss + self.args.lamb * distance

    def reference(self, inputs: dict) -> dict[int, torch.Tensor]:
        """The hidden states after each block, [batch, tokens, hidden], without the adapter, dropout or a graph."""
        model = self.accelerator.unwrap_model(self.model)
        blocks = {i: b.module for i, b in enumerate(self.blocks)}
        with still(model), torch.no_grad(), self.accelerator.autocast(), model.disable_adapter(), capture(blocks) as h0:
            last_hidden(model, {k: inputs[k] for k in ("input_ids", "attention_mask")})
        return h0

    def cost(self) -> float:
        """A forward is a third of a step."""
        return 1.0 if self.args.lamb == 0 else 4 / 3
