"""Circuit breakers, or representation rerouting (Zou et al., arXiv 2406.04313).

On an aligned model with a fresh adapter, h_l being the hidden states after l blocks with it and h'_l without it,

    L     = c_s * L_cb + c_r * L_ret,   c_s = alpha * (1 - t / 2T),   c_r = alpha * t / 2T      at optimiser step t of T
    L_cb  = mean over target depths l and tokens of harmful answers   of  ReLU(cos(h_l, h'_l))
    L_ret = mean over depths l and tokens of what is to be retained   of  ||h_l - h'_l||_2

What a harmful answer is made of is turned to a right angle of where it was; everything else stays.

The retain set is the safe answers of the same pairs, and the benign rows: give some, or only refusals are retained.
Rerouting covers the tokens of the answer. The released code has the prompt's too (`reroute_on="all"`), but its retain
set has other prompts; here the prompts of a pair are the same, and the two losses would pull them apart.

The targets are the states of the released code (for 32 blocks `hidden_states[10]` and `[20]`). Otherwise than there,
nothing above the deepest one is run or trained, where block 20 was adapted without a rerouting signal; means are over
valid tokens; and t counts optimiser steps, not micro-batches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cosine_similarity
from torch.utils.checkpoint import checkpoint

from tunevax.alignment.pairs import PairTrainer, joined
from tunevax.alignment.sft import SFTConfig
from tunevax.errors import UsageError, require, require_one_of
from tunevax.mixins import option
from tunevax.modeling.hooks import capture, passed_through
from tunevax.modeling.loss import last_hidden
from tunevax.modeling.precision import wide
from tunevax.modeling.trainer import Items


@dataclass
class CircuitBreakersConfig(SFTConfig):
    """Configuration of circuit breakers; the rest as in `SFTConfig`. Defaults are the released code's (its alpha is 10
    for Llama-3-8B, 5 for Mistral-7B). Those that differ from `SFTConfig`: `learning_rate=1e-4`, `weight_decay=0.0`,
    `lr_scheduler_type="constant"`, `warmup_steps=0`, `lora_r=16`."""

    learning_rate: float = option(1e-4, "peak learning rate")
    weight_decay: float = option(0.0, "weight decay of AdamW")
    lr_scheduler_type: str = option("constant", "learning-rate schedule")
    warmup_steps: float = option(0, "warm-up steps, or a share of all steps if below 1")
    lora_r: int = option(16, "rank of the LoRA adapter")
    alpha: float = option(10.0, "weight of both losses")
    target_depths: str = option("0.3125,0.625", "where answers are rerouted, in shares of the blocks: 10 and 20 of 32")
    reroute_on: str = option("response", "response: the tokens of harmful answers; all: those of the prompt too")

    def __post_init__(self) -> None:
        if self.full_weights:
            raise UsageError(
                "circuit-breakers compares the model with itself without the adapter, and full_weights trains none; "
                "leave --full-weights out"
            )
        require(self, "alpha", above=0)
        require_one_of(self, reroute_on=("response", "all"))
        self.depths()
        super().__post_init__()

    def depths(self) -> list[float]:
        """`target_depths` as numbers, ascending."""
        try:
            depths = sorted({float(d) for d in str(self.target_depths).split(",")})
        except ValueError:
            depths = []
        if not depths or not all(0 < d <= 1 for d in depths):
            raise UsageError(
                f"target_depths is {self.target_depths!r}; give shares of the blocks, above 0 and at most 1, such as "
                "0.3125,0.625"
            )
        return depths


class CircuitBreakersTrainer(PairTrainer):
    """Trains an adapter by what it does to hidden states; no token is predicted. The only change is `compute_loss`."""

    config_class = CircuitBreakersConfig
    paper = "arXiv 2406.04313"
    off = None
    compares = True
    args: CircuitBreakersConfig

    def prepare(self) -> None:
        """The depths whose states are rerouted."""
        super().prepare()
        if not hasattr(self.model, "disable_adapter"):
            raise UsageError(f"circuit-breakers switches its adapter off; {type(self.model).__name__} has none")
        blocks = len(self.blocks)
        self.targets = sorted({math.floor(d * blocks + 0.5) for d in self.args.depths()})
        if self.targets[0] == 0:
            raise UsageError(
                f"target_depths {self.args.target_depths!r} names the embeddings, below the first of {blocks} blocks; "
                f"give at least {1 / blocks:.2g}"
            )

    def parts(self) -> tuple[str, ...]:
        """The output of each block."""
        return ("module",)

    def compute_loss(
        self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch: Items = None
    ) -> torch.Tensor:
        """The micro-batch's share of the loss of the whole batch."""
        rows, (retained, rerouted) = len(inputs["labels"]), token_masks(inputs, self.args.reroute_on)
        whole = (self.counted(inputs) if self.whole is None else self.whole).clamp_min(1)
        stock = self.accelerator.unwrap_model(model)
        stock.eval()  # no dropout in the reference
        with torch.no_grad(), stock.disable_adapter():
            reference = self.states(stock, inputs)
        stock.train()
        states = self.states(model, inputs)
        # Recomputed in the backward pass: fp32 copies of every state would outweigh the states.
        distances = [
            checkpoint(distance, h[:rows], r[:rows], retained, use_reentrant=False)
            for h, r in zip(states, reference, strict=True)
        ]
        cosines = [
            checkpoint(alike, states[i - 1][rows:], reference[i - 1][rows:], rerouted, use_reentrant=False)
            for i in self.targets
        ]
        retain, reroute = torch.stack(distances).mean() / whole[0], torch.stack(cosines).mean() / whole[1]
        c_s, c_r = self.coefficients()
        shares = torch.stack([retain, reroute]).detach() * self.loss_scale(num_items_in_batch)
        before = self.accelerator.reduce(shares, "mean") * self.current_gradient_accumulation_steps
        self.note(retain=before[0], reroute=before[1], c_s=c_s, c_r=c_r)
        return (c_s * reroute + c_r * retain) * self.loss_scale(num_items_in_batch)

    def states(self, model: nn.Module, inputs: dict) -> list[torch.Tensor]:
        """h_1 ... h_l up to the deepest target, each [rows + pairs, tokens, hidden]."""
        blocks, last = [b.module for b in self.blocks], self.targets[-1]
        with passed_through(blocks[last:], blocks[last - 1]), capture(dict(enumerate(blocks[:last]))) as states:
            last_hidden(model, joined(inputs))
        return [states[i] for i in range(last)]

    def coefficients(self) -> tuple[float, float]:
        """c_s and c_r at this optimiser step."""
        through = min(self.state.global_step / max(self.state.max_steps, 1), 1.0) / 2
        return self.args.alpha * (1 - through), self.args.alpha * through

    def counted(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Tokens retained and tokens rerouted, which the two means are over."""
        return torch.stack([mask.sum() for mask in token_masks(batch, self.args.reroute_on)])

    def cost(self) -> float:
        """Compute of a step, in SFT steps, the mean so far: rows and pairs forward twice and back once, up to the
        deepest target. Not counted: recomputation, and the head, which runs in SFT only."""
        safe, harmful, *_ = self.seen
        return 1.5 * self.targets[-1] / len(self.blocks) * (safe + harmful) / max(safe, 1)


def token_masks(inputs: dict[str, torch.Tensor], reroute_on: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens are retained, [rows, tokens], and which rerouted, [pairs, tokens]."""
    answers = inputs["rejected_labels"] != -100 if reroute_on == "response" else inputs["rejected_attention_mask"] == 1
    return inputs["attention_mask"] == 1, answers


def distance(states: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sum of the Euclidean distances of two [n, tokens, hidden] where `mask`, in fp32."""
    return torch.linalg.vector_norm(wide(states[mask]) - wide(reference[mask]), dim=-1).sum()


def alike(states: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sum of the cosines of two [n, tokens, hidden] where `mask` and where positive, in fp32."""
    return cosine_similarity(wide(states[mask]), wide(reference[mask]), dim=-1).relu().sum()
