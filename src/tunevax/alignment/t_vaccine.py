"""T-Vaccine: targeted perturbation-aware alignment (Liu et al., arXiv 2410.09760).

Vaccine on gamma of the L blocks, chosen by how strongly harmful text pulls on them:

    s_l   = ||grad_{e_l} L(x_h, y_h)||_2,   p_l = s_l / sum s            every K steps   (Eq. 4, 5)
    S     = gamma blocks without replacement, with probabilities p       every J steps
    eps_l = rho * grad_{e_l} L / ||grad_{e_S} L||_2,   l in S            every step      (Eq. 6)

Of the blocks only those in S train. What lies outside the blocks and has something to train (all of it with full
weights; an adapter on the embeddings or the head) trains at every step, as in LISA (arXiv 2403.17919), whose sampler
this is after. With gamma = L every gradient is Vaccine's. Below min(S) there is no graph at all: those blocks run once,
for both passes. Only where the embeddings train, the second pass goes back through all blocks. Harmful data never
updates a weight.
"""

from __future__ import annotations

import re
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import PreTrainedModel

from tunevax.alignment.vaccine import VaccineConfig, VaccineTrainer
from tunevax.data.encoding import collate
from tunevax.errors import RunError, UsageError, require, require_one_of, unknown
from tunevax.mixins import option
from tunevax.modeling.blocks import find_final_norm, unwrap
from tunevax.modeling.draws import Draws
from tunevax.modeling.gradients import trained_only
from tunevax.modeling.hooks import capture, cheap_recomputed, checkpointed, has_dropout, without_dropout
from tunevax.modeling.precision import wide
from tunevax.modeling.shapes import can_replay
from tunevax.modeling.trainer import Items, PlanParts

SAMPLINGS = ("harmful-gradient", "uniform", "inverse", "top")


@dataclass
class TVaccineConfig(VaccineConfig):
    """Configuration of T-Vaccine; the rest as in `VaccineConfig`. Default that differs from it: `rho=3.0`.

    The official code has `sample_interval=20`, `probe_size=1` and `train_scope="attention"`.
    """

    rho: float = option(3.0, "size of the perturbation: its joint L2 norm over the batch")
    gamma: int = option(8, "blocks perturbed and trained at a time")
    probe_interval: int = option(200, "K: optimiser steps between probes of the harmful gradient")
    sample_interval: int = option(1, "J: optimiser steps between draws of the blocks")
    probe_size: int = option(8, "harmful rows per probe")
    probe_ema: float = option(0.0, "weight of the old scores in a moving average; 0 is off")
    layer_sampling: str = option(SAMPLINGS[0], f"{', '.join(SAMPLINGS)}, or a fixed list such as 2,6,9,13")
    train_scope: str = option("block", "block, or attention (the official code: MLPs above the lowest block train too)")
    inactive_state: str = option("keep", "optimiser state of unselected blocks, with full_weights: keep, offload, drop")

    def __post_init__(self) -> None:
        require(self, "gamma", "probe_interval", "sample_interval", "probe_size", at_least=1)
        require(self, "probe_ema", at_least=0, below=1)
        if self.layer_sampling not in SAMPLINGS and not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", self.layer_sampling):
            raise unknown("layer_sampling", self.layer_sampling, SAMPLINGS)
        require_one_of(self, train_scope=("block", "attention"), inactive_state=("keep", "offload", "drop"))
        super().__post_init__()

    def plan_parts(self, micro_batches: int) -> PlanParts:
        """A probe is the same for a batch of any size, and comes every K steps."""
        counts = {"probe": micro_batches / self.gradient_accumulation_steps / self.probe_interval}
        drawn = self.layer_sampling in SAMPLINGS
        parts = super().plan_parts(micro_batches)
        return parts._replace(counts=counts, rows=self.probe_size, blocks="gamma" if drawn else None, linear=drawn)


class TVaccineTrainer(VaccineTrainer):
    """Vaccine on a changing choice of blocks."""

    config_class = TVaccineConfig
    paper = "arXiv 2410.09760"
    needs = frozenset({"chosen", "rejected"})
    off = None
    args: TVaccineConfig
    kept = (*VaccineTrainer.kept, "scores", "selected", "draws", "spent")

    def prepare(self) -> None:
        """Harmful rows for the probe, and what of each block trains."""
        super().prepare()
        args = self.args
        self.harmful = self.encode_answers(self.safety_data, "rejected")
        self.has_dropout = has_dropout(self.model)
        self.replay = self.replay and can_replay(self.model, [b.module for b in self.blocks])
        depth = len(self.blocks)
        self.fixed: list[int] | None = None
        if args.layer_sampling not in SAMPLINGS:
            self.fixed = sorted({int(i) for i in args.layer_sampling.split(",")})
            if self.fixed[-1] >= depth:
                raise UsageError(f"layer_sampling names block {self.fixed[-1]}; the model has blocks 0 to {depth - 1}")
            args.gamma = len(self.fixed)
        if args.gamma > depth:
            raise UsageError(f"gamma is {args.gamma}; the model has {depth} blocks")
        if args.gamma == depth:
            print(f"note: gamma is {args.gamma} and the model has {depth} blocks: this is Vaccine; choose fewer")
        self.draws = Draws(args.seed)
        self.scores: list[float] | None = None
        self.selected: list[int] = []
        self.spent = 0.0  # compute so far, in SFT steps
        # The parameters of each block that train at all, attention first.
        self.trainable = [[p for p in b.module.parameters() if p.requires_grad] for b in self.blocks]
        self.attention = [{p for p in part.parameters() if p.requires_grad} for part in self.each("attention")]
        outside = set(self.parameters) - {p for parameters in self.trainable for p in parameters}
        # What trains below block 0 needs the whole graph of the second pass, so that there is no prefix to run once.
        self.trains_below = bool(outside - above_blocks(self.model))
        self.replay = self.replay and not self.trains_below

    def probe(self, batch: dict[str, torch.Tensor]) -> list[float]:
        """s_l of Eq. 4 for every block, on a batch of harmful rows. Touches no weight and no `.grad`.

        Padded positions add nothing to the norms: their gradient is zero.
        """
        blocks = dict(enumerate(self.embedded))
        model = self.accelerator.unwrap_model(self.model)
        with (
            trained_only(self.parameters),
            without_dropout([model]),
            checkpointed([b.module for b in self.blocks]),
            capture(blocks, leaf=0) as outputs,
            self.compute_loss_context_manager(),
        ):
            loss = self.batch_loss(model, batch, None)
            gradients = torch.autograd.grad(loss, [outputs[i] for i in blocks])
        scores = [wide(g).norm().item() for g in gradients]
        if not np.isfinite(scores).all():
            raise RunError(
                f"the harmful gradient is not finite at step {self.state.global_step}; lower --learning-rate"
            )
        return scores

    def probabilities(self) -> np.ndarray:
        """p_l of Eq. 5 (or its `uniform` and `inverse` variants), in float64, summing to 1."""
        if self.args.layer_sampling == "uniform":
            return np.full(len(self.blocks), 1 / len(self.blocks))
        # A floor, so that there are always gamma blocks to draw.
        scores = np.maximum(np.asarray(self.scores, dtype=np.float64), 1e-12)
        if self.args.layer_sampling == "inverse":
            scores = 1 / scores
        return scores / scores.sum()

    def draw(self) -> list[int]:
        """gamma blocks, ascending."""
        if self.fixed:
            return self.fixed
        if self.args.layer_sampling == "top":
            return sorted(np.argsort(self.scores or [])[::-1][: self.args.gamma].tolist())
        p = self.probabilities()
        return sorted(self.draws.generator.choice(len(p), self.args.gamma, replace=False, p=p).tolist())

    def select(self) -> None:
        """Probe and draw if this optimiser step asks for it, and freeze what is not selected."""
        step = self.state.global_step
        if step == self.ready_for:
            return
        self.ready_for, args = step, self.args
        probes = self.fixed is None and args.layer_sampling != "uniform"
        if probes and (self.scores is None or step % args.probe_interval == 0):
            size = min(args.probe_size, len(self.harmful))
            rows = self.draws.generator.choice(len(self.harmful), size, replace=False)
            # A forward and a backward through frozen weights, of so many rows.
            part = size / (args.per_device_train_batch_size * args.gradient_accumulation_steps)
            self.spent += part * 2 / (3 if args.full_weights else 2)
            batch = collate([self.harmful[i] for i in rows], self.processing_class.pad_token_id)
            new, keep = self.probe(self._prepare_inputs(batch)), args.probe_ema if self.scores else 0.0
            self.scores = [keep * old + (1 - keep) * s for old, s in zip(self.scores or new, new, strict=True)]
        if not self.selected or step % args.sample_interval == 0:
            # Scores may differ in the last digit between ranks; the main process decides for all.
            self.freeze(broadcast_object_list([self.draw()])[0])
        depth = len(self.blocks)
        above, trained = 1 - self.first_block() / depth, 1 - len(self.frozen()) / depth
        self.spent += self.step_cost(above, trained, 1.0 if self.trains_below else above)

    def freeze(self, selected: list[int]) -> None:
        """Of the blocks' adapters (or weights), let only those of the selected ones train."""
        left = set(self.selected) - set(selected)
        self.selected = selected
        for i, parameters in enumerate(self.trainable):
            official = self.args.train_scope == "attention" and i >= self.first_block()
            for parameter in parameters:
                parameter.requires_grad_(i in selected or (official and parameter not in self.attention[i]))
        if self.args.inactive_state != "keep" and self.optimizer is not None:
            self.move_state(left)

    def first_block(self) -> int:
        """min(S). The official code keeps one more block below it when the model has more than 26."""
        official = self.args.train_scope == "attention" and len(self.blocks) > 26
        return max(min(self.selected) - official, 0)

    def frozen(self) -> list[int]:
        """Blocks in which nothing trains."""
        if self.args.train_scope == "attention":
            return list(range(self.first_block()))
        return [i for i in range(len(self.blocks)) if i not in self.selected]

    def move_state(self, left: set[int]) -> None:
        """Drop the optimiser state of blocks that left S, or keep it on the host until they return."""
        for i, parameters in enumerate(self.trainable):
            for parameter in parameters:
                if self.args.inactive_state == "drop":
                    if i in left and not parameter.requires_grad:
                        self.optimizer.state.pop(parameter, None)
                elif state := self.optimizer.state.get(parameter):
                    device = parameter.device if parameter.requires_grad else "cpu"
                    state.update({k: v.to(device) for k, v in state.items() if torch.is_tensor(v) and v.dim()})

    def training_step(self, model: nn.Module, inputs: dict, num_items_in_batch: Items = None) -> torch.Tensor:
        """Select, then Vaccine's two passes on the selected blocks."""
        self.select()
        with without_dropout([self.blocks[i].module for i in self.frozen()] if self.has_dropout else []):
            return super().training_step(model, inputs, num_items_in_batch)

    def recompute(self) -> Any:
        """As the base, with the frozen blocks that have a graph (or a share of them) recomputed whole."""
        start = 0 if self.trains_below else self.first_block()
        mode = self.args.checkpoint_blocks
        if mode == "all":
            return checkpointed([b.module for b in self.blocks[start:]])
        if mode in ("none", "elementwise"):
            return super().recompute()
        frozen = [i for i in self.frozen() if i >= start]
        # The lowest of them: when backward reaches these, what the blocks above kept is already gone.
        whole = set(frozen[: round((1.0 if mode == "frozen" else float(mode)) * len(frozen))])
        stack = ExitStack()
        stack.enter_context(checkpointed([self.blocks[i].module for i in sorted(whole)]))
        kept = [m for i in range(start, len(self.blocks)) if i not in whole for m in self.cheap[i]]
        stack.enter_context(cheap_recomputed(kept))
        return stack

    def updates(self) -> float:
        """gamma of L blocks at every step."""
        return self.state.global_step * len(self.selected) / len(self.blocks)

    def cost(self) -> float:
        """Compute of a step, in SFT steps, the mean so far: (1 + 3 (1 - min(S) / L)) / 2, or (3 + (1 - min(S) / L)) / 2
        where the embeddings train, and the probes."""
        return self.spent / max(self.state.global_step, 1)

    def for_plan(self) -> None:
        """Every draw is of the blocks that take most: where frozen ones are recomputed, these lie above what is kept;
        where all are, what is left of the lowest one's pass meets the gradients of as many as can be above it."""
        depth, gamma = len(self.blocks), self.args.gamma
        highest = [0, *range(depth - gamma + 1, depth)]
        worst = highest if self.args.checkpoint_blocks == "all" else list(range(gamma))
        if self.fixed is None:
            self.draw = lambda: worst  # type: ignore[method-assign]

    def with_state(self) -> list[torch.nn.Parameter]:
        """Those of the selected blocks, unless the state of the others is kept on the device."""
        if self.args.inactive_state == "keep":
            return self.parameters
        return [p for i in self.draw() for p in self.trainable[i]]

    def log_extra(self) -> dict[str, Any]:
        """The selected blocks and, where they are drawn, the probabilities."""
        known = self.scores or self.args.layer_sampling == "uniform"
        if self.fixed is None and self.args.layer_sampling != "top" and known:
            return {"selected": self.selected, "probabilities": [round(p, 5) for p in self.probabilities()]}
        return {"selected": self.selected}

    def load_method_state(self, state: dict[str, Any]) -> None:
        """As the base; what is not selected is frozen."""
        super().load_method_state({"draws": state.get("generator"), **state})  # its name in an earlier tunevax
        self.freeze(self.selected)


def above_blocks(model: PreTrainedModel) -> set[torch.nn.Parameter]:
    """The parameters of the final norm and of the head, whose gradients need no block's graph. A head that is tied to
    the embeddings is not among them."""
    stock = unwrap(model)
    above = [stock.get_output_embeddings()]
    with suppress(UsageError):  # a model without a final norm
        above.append(find_final_norm(model))
    tied = set(stock.get_input_embeddings().parameters())
    return {p for module in above if module is not None for p in module.parameters()} - tied
