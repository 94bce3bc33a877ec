"""Trains only the blocks that a layer-selecting defence chose least (adaptive, arXiv 2402.16382).

A defence that perturbs some blocks more leaves others less hardened, and its record or paper shows which.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunevax.attacks.context import AttackContext, TargetOptions
from tunevax.attacks.finetune import FinetuneConfig
from tunevax.attacks.kind import NotApplicable
from tunevax.errors import require
from tunevax.mixins import option
from tunevax.modeling.trainer import ResponseTrainer
from tunevax.records import LOG, ModelInfo, Target, is_run, read_lines, read_run


@dataclass
class AdaptiveConfig(FinetuneConfig):
    """Options as in `FinetuneConfig`, and which blocks to train."""

    in_name = ("like",)

    like: str | None = option(None, "the run whose least selected blocks are trained; default the attacked model")
    share: float = option(0.5, "share of the blocks that is trained")

    def __post_init__(self) -> None:
        require(self, "share", above=0, at_most=1)
        super().__post_init__()

    @classmethod
    def expand(cls, options: dict[str, Any], targets: Sequence[Target], depth: int) -> dict[str, Any]:
        """One attack for each hardened model that recorded a choice of blocks."""
        return options if "like" in options else {**options, "like": adaptable(targets) or None}

    def applies(self, targets: Sequence[Target], options: TargetOptions) -> str | None:
        """A model must have recorded a choice of blocks."""
        if self.like is None and not adaptable(targets):
            return "no model here recorded a choice of blocks"
        return super().applies(targets, options)

    def restrict(self, trainer: ResponseTrainer, context: AttackContext) -> None:
        """Freeze all but the least selected blocks; embeddings and head stay as they are."""
        blocks = least_selected(self.like or context.target["ref"], self.share)
        inside = {id(p) for i in blocks for p in trainer.blocks[i].module.parameters()}
        for parameter in trainer.parameters:
            parameter.requires_grad_(id(parameter) in inside)
        context.record["blocks_attacked"] = blocks


def adaptable(targets: Sequence[Target]) -> list[str]:
    """The hardened models that recorded a choice of blocks."""
    refs = []
    for ref in (target["ref"] for target in targets if target["role"] == "model"):
        with suppress(NotApplicable):
            least_selected(ref, 0.5)
            refs.append(ref)
    return refs


def least_selected(ref: str, share: float) -> list[int]:
    """The blocks that a hardening chose least, ascending: by the mean of the probabilities in its log, or without these
    by how often it chose each. Raises `NotApplicable`: the run recorded no choice of blocks."""
    lines = read_lines(Path(ref) / LOG) if is_run(ref) else []
    chosen = [line for line in lines if line.get("selected")]
    if not chosen:
        raise NotApplicable(f"{ref} recorded no choice of blocks to adapt to")
    depth = int((read_run(ref)["model"] or ModelInfo()).get("blocks") or 0)
    if all(len(line["selected"]) == depth for line in chosen):
        raise NotApplicable(f"{ref} chose all its {depth} blocks at every step, so there is no choice to adapt to")
    if drawn := [line["probabilities"] for line in chosen if line.get("probabilities")]:
        weight = {i: sum(p[i] for p in drawn) / len(drawn) for i in range(depth)}
    else:
        weight = Counter(i for line in chosen for i in line["selected"])
    count = max(1, round(share * depth))
    return sorted(sorted(range(depth), key=lambda i: (weight[i], i))[:count])
