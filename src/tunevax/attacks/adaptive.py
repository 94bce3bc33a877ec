"""Trains only the blocks that a layer-selecting defence chose least (adaptive, arXiv 2402.16382).

A defence that perturbs some blocks more leaves others less hardened, and its record or its paper tells which.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tunevax.attacks.attack import Bench, NotApplicable
from tunevax.attacks.finetune import FinetuneConfig
from tunevax.modeling.trainer import ResponseTrainer
from tunevax.runs import is_run, read_lines, read_run


@dataclass
class AdaptiveConfig(FinetuneConfig):
    """Options as in `FinetuneConfig`, and which blocks to train."""

    like: str | None = field(
        default=None, metadata={"help": "the run whose least selected blocks are trained; default the attacked model"}
    )
    share: float = field(default=0.5, metadata={"help": "share of the blocks that is trained"})

    def restrict(self, trainer: ResponseTrainer, bench: Bench) -> None:
        """Freeze all but the least selected blocks; embeddings and head stay as they are."""
        blocks = least_selected(self.like or bench.target["ref"], self.share)
        inside = {id(p) for i in blocks for p in trainer.blocks[i].module.parameters()}
        for parameter in trainer.parameters:
            parameter.requires_grad_(id(parameter) in inside)
        bench.record["blocks_attacked"] = blocks


def least_selected(ref: str, share: float) -> list[int]:
    """The blocks that a hardening chose least, ascending.

    They are told by the mean of the probabilities that its log recorded, or failing that by how often it took each.

    Raises:
        NotApplicable: the run recorded no choice of blocks.
    """
    log = Path(ref) / "log.jsonl"
    lines = read_lines(log) if is_run(ref) and log.is_file() else []
    chosen = [line for line in lines if line.get("selected")]
    if not chosen:
        raise NotApplicable(f"{ref} recorded no choice of blocks to adapt to")
    depth = read_run(ref)["model"]["blocks"]
    if all(len(line["selected"]) == depth for line in chosen):
        raise NotApplicable(f"{ref} took all its {depth} blocks at every step, so there is no choice to adapt to")
    drawn = [line["probabilities"] for line in chosen if line.get("probabilities")]
    if drawn:
        weight = {i: sum(p[i] for p in drawn) / len(drawn) for i in range(depth)}
    else:
        weight = Counter(i for line in chosen for i in line["selected"])
    count = max(1, round(share * depth))
    return sorted(sorted(range(depth), key=lambda i: (weight[i], i))[:count])
