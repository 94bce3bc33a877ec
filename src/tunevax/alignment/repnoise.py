"""RepNoise: representation noising (Rosati et al., arXiv 2405.14577).

Over pairs of a safe answer x^s and a harmful answer x^h to the same prompt,

    L = CE(x^s) + beta * mean_l MMD(a_l(x^h), xi_l) - alpha * log( mean_i CE(W_U norm(h_i), x^h) )

with a_l the output of block l's MLP, xi_l ~ N(0, I) of its shape, drawn anew at each step, h_i the hidden states of the
L + 1 depths from the embeddings to the last block, norm and W_U the model's own final norm and head. The harmful answer
is unlearnt at every depth, and its representation drawn to noise that an attacker finds nothing in.

MMD has five Gaussian kernels over whole answers: each is one point, of all its tokens and hidden dimensions together.

`variant="official"` is what the released code computes:

- only tokens that differ, place by place, between x^s and x^h count, pads included, and none with token id 0;
- logits are masked by the place they are computed at: the first such token is predicted from logits of zero, so the
  token that decides between refusing and complying has no gradient;
- the last state, normed already, is normed again, and then counted once more as it is, in a sum over L + 1;
- alpha * log(1 + mean), a slip of precedence by its author's word.

`variant="corrected"` counts the tokens of the answers, each depth once, and takes the logarithm of the mean.

Benign rows enter the retain loss, CE(x^s), and have no part in the rest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tunevax.alignment.pairs import PairTrainer, joined
from tunevax.alignment.sft import SFTConfig
from tunevax.errors import require, require_one_of
from tunevax.mixins import option
from tunevax.modeling.blocks import find_final_norm
from tunevax.modeling.draws import noise_generator
from tunevax.modeling.hooks import capture, capture_inputs
from tunevax.modeling.loss import head_loss, labelled, last_hidden, rows_at
from tunevax.modeling.precision import added, wide
from tunevax.modeling.quantization import size_of
from tunevax.modeling.trainer import Items

KERNELS = 5


@dataclass
class RepNoiseConfig(SFTConfig):
    """Configuration of RepNoise; the rest as in `SFTConfig`. alpha and beta are the paper's; its authors say that both,
    the learning rate and the number of pairs always need a search."""

    alpha: float = option(1.0, "weight of the ascent on harmful answers, layer by layer")
    beta: float = option(0.001, "weight of the distance of harmful activations to noise")
    variant: str = option("corrected", "corrected, or official: the released code's loss")

    def __post_init__(self) -> None:
        require(self, "alpha", "beta", at_least=0)
        require_one_of(self, variant=("corrected", "official"))
        super().__post_init__()


class Targets(NamedTuple):
    """What a cross entropy is taken over."""

    labels: torch.Tensor  # [rows, tokens], -100 where there is none
    dead: int = 0  # how many more tokens are predicted from logits of zero: log V each, without gradient


class Pass(NamedTuple):
    """One forward over the rows of a batch and their pairs."""

    safe: torch.Tensor  # the head's input, [rows, tokens, hidden]
    harmful: torch.Tensor  # the same of the pairs, [pairs, tokens, hidden]
    states: list[torch.Tensor]  # h_0 ... h_{L-1} of the pairs, each [pairs, tokens, hidden]
    activations: list[torch.Tensor]  # a_0 ... a_{L-1} of the pairs, each [pairs, tokens, hidden]


class RepNoiseTrainer(PairTrainer):
    """SFT with two more terms in the loss. The only change is `compute_loss`."""

    config_class = RepNoiseConfig
    paper = "arXiv 2405.14577"
    off = None  # at alpha = beta = 0 rows are still padded as wide as their pairs: SFT but for rounding and dropout
    args: RepNoiseConfig
    kept = (*PairTrainer.kept, "drawn")
    drawn = 0  # micro-batches that noise was drawn for so far

    def prepare(self) -> None:
        """The model's final norm."""
        super().prepare()
        self.norm = find_final_norm(self.model)

    def parts(self) -> tuple[str, ...]:
        """What enters each block and is read by the final norm, and the output of its MLP where that is drawn to
        noise."""
        return ("module", "norm", "mlp") if self.args.beta else ("module", "norm")

    def counted(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The pairs, which the weights of the micro-batches are shares of."""
        return torch.tensor([len(batch["pairs"])])

    def compute_loss(
        self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch: Items = None
    ) -> torch.Tensor:
        """The loss of a micro-batch, to be added up over micro-batches and averaged over ranks.

        The retain loss adds up to that of the whole batch. The other two terms are not sums over rows: each micro-batch
        of each rank has its own, and their mean counts, weighted by the pairs in each.
        """
        pairs = len(inputs["pairs"])
        whole = pairs if self.whole is None else self.whole.item()
        weight = pairs / max(whole or pairs, 1) * self.loss_scale(num_items_in_batch)
        share = 1 / self.current_gradient_accumulation_steps
        safe, harmful, mask = self.targets(inputs)
        with self.accelerator.autocast():
            outputs = self.forward(model, inputs)
            if self.args.variant == "official":
                loss = share * self.cross_entropy(model, [outputs.safe], safe)
            else:
                positions, targets = labelled(safe.labels)
                items = len(positions) if num_items_in_batch is None else num_items_in_batch
                scale = wide(outputs.safe.new_ones(())) / items
                loss = head_loss(model, rows_at(outputs.safe, positions), targets, scale)
                loss = loss * self.loss_scale(num_items_in_batch)
            self.note(retain=self.accelerator.reduce(loss.detach() / share, "mean"))
            if len(mask) and self.args.alpha:
                ascent = self.ascent(model, outputs, harmful)
                loss = loss - self.args.alpha * weight * torch.log(ascent + (self.args.variant == "official"))
                self.note(ascent=ascent.detach())
        if len(mask) and self.args.beta:
            loss = loss + self.args.beta * weight * (distance := self.distance(outputs.activations, mask))
            self.note(mmd=distance.detach(), activation_rms=activation_rms(outputs.activations, mask))
        return loss

    def forward(self, model: nn.Module, inputs: dict) -> Pass:
        """Rows and pairs through the model together."""
        rows, blocks = len(inputs["labels"]), [b.module for b in self.blocks]
        mlps = dict(enumerate(self.each("mlp"))) if self.args.beta else {}
        with capture(mlps) as outputs, capture_inputs(blocks) as states:
            hidden = last_hidden(model, joined(inputs))
        # OPT flattens rows and tokens before its MLP.
        activations = [a.reshape(*hidden.shape[:2], -1)[rows:] for a in outputs.values()]
        return Pass(hidden[:rows], hidden[rows:], [states[i][rows:] for i in range(len(blocks))], activations)

    def targets(self, inputs: dict) -> tuple[Targets, Targets, torch.Tensor]:
        """Those of the retain loss, those of the ascent, and which activations are drawn to noise, [pairs, tokens]."""
        harmful = inputs["rejected_labels"]
        if self.args.variant == "corrected":
            return Targets(inputs["labels"]), Targets(harmful), harmful != -100
        ids, harmful_ids, pairs = inputs["input_ids"], inputs["rejected_input_ids"], inputs["pairs"]
        differ = ids[pairs] != harmful_ids
        chosen = divergent(ids[pairs], differ)
        labels = inputs["labels"].clone()  # benign rows keep theirs
        labels[pairs] = chosen.labels
        return Targets(labels, chosen.dead), divergent(harmful_ids, differ), differ

    def ascent(self, model: nn.Module, outputs: Pass, targets: Targets) -> torch.Tensor:
        """The mean over depths of the cross entropy of harmful answers, read off each depth by the final norm and head.

        Only labelled tokens are normed and multiplied by the head. Norms are recomputed in the backward pass, and the
        head's gradient is taken chunk by chunk as its logits are made: no logits are kept, of no depth.
        """
        positions, _ = labelled(targets.labels)
        inner = [*outputs.states, *([outputs.harmful] if self.args.variant == "official" else [])]
        states = [checkpoint(self.norm, rows_at(s, positions), use_reentrant=False) for s in inner]
        states.append(rows_at(outputs.harmful, positions))
        return self.cross_entropy(model, states, targets) / (len(self.blocks) + 1)

    def cross_entropy(self, model: nn.Module, states: list[torch.Tensor], targets: Targets) -> torch.Tensor:
        """The mean over targets, summed over `states`: head inputs, whole or at the labelled positions only."""
        positions, ids = labelled(targets.labels)
        rows = torch.cat([rows_at(s, positions) if s.dim() == 3 else s for s in states])
        dead = targets.dead * len(states) * math.log(self.model.config.get_text_config().vocab_size)
        return (head_loss(model, rows, ids.repeat(len(states))) + dead) / max(len(ids) + targets.dead, 1)

    def distance(self, activations: list[torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
        """The mean over blocks of the MMD between harmful activations and noise. Backward draws the same noise again,
        so that neither it nor fp32 copies are kept."""
        noise = noise_generator(self, self.drawn, mask.device)
        self.drawn += 1
        distances = [
            checkpoint(mmd_to_noise, a, mask, noise, noise.get_state(), use_reentrant=False) for a in activations
        ]
        return torch.stack(distances).mean()

    def cost(self) -> float:
        """Compute of a step, in SFT steps, the mean so far: tokens of rows and pairs over tokens of rows, and the head
        at each depth. Not counted: recomputation and the distance to noise."""
        safe, harmful, safe_labels, harmful_labels = self.seen
        body = sum(size_of(p) for b in self.blocks for p in b.module.parameters())
        head = sum(p.numel() for p in self.model.get_output_embeddings().parameters())
        depths = len(self.blocks) + 1 + (self.args.variant == "official") if self.args.alpha else 0
        return 1 + (body * harmful + depths * head * harmful_labels) / max(body * safe + head * safe_labels, 1)


def divergent(ids: torch.Tensor, differ: torch.Tensor) -> Targets:
    """The released code's targets: tokens where `differ` and whose id is not 0, the ones whose predecessor is the same
    in both answers without gradient."""
    target = differ & (ids != 0)
    live = target.clone()
    live[:, 1:] &= differ[:, :-1]
    return Targets(ids.masked_fill(~live, -100), int((target & ~live)[:, 1:].sum()))


def mmd_to_noise(
    activations: torch.Tensor, mask: torch.Tensor, generator: torch.Generator, state: torch.Tensor
) -> torch.Tensor:
    """`mmd` of activations [n, tokens, hidden] where `mask`, and Gaussian noise drawn from `state` on."""
    generator.set_state(state)
    noise = torch.randn(activations.shape, generator=generator, device=activations.device)
    mask = mask[..., None]
    with torch.autocast(mask.device.type, enabled=False):
        return mmd((wide(activations) * mask).flatten(1), (noise * mask).flatten(1))


def mmd(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Maximum mean discrepancy of samples [n, features], the biased estimate, under five Gaussian kernels whose widths
    are 1/4 to 4 times the mean squared distance of different points.

    Distances come from the Gram matrix: memory is that of the samples, not [2n, 2n, features].
    """
    n, z = len(x), torch.cat([x, y])
    gram = z @ z.T
    square = gram.diagonal()
    distance = (square[:, None] + square[None, :] - 2 * gram).clamp_min(0)
    mean = distance.detach().sum() / (2 * n * (2 * n - 1))
    width = mean.clamp_min(1e-12) / 2 ** (KERNELS // 2)  # the floor is for samples that are all equal: then it is 0
    kernel = added(torch.exp(-distance / (width * 2**q)) for q in range(KERNELS))
    return (kernel[:n, :n] + kernel[n:, n:] - kernel[:n, n:] - kernel[n:, :n]).mean()


def activation_rms(activations: list[torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
    """The root mean square of activations where `mask`, the mean over blocks. The noise has 1."""
    with torch.no_grad():
        return torch.stack([wide(a[mask]).square().mean().sqrt() for a in activations]).mean()
