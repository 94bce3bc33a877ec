"""Moves the weights back towards the public base, without any training.

The attacker has the public base as well as the hardened model, and interpolates between them or extrapolates:

    W = W_hard - dose * (W_hard - W_base)

Dose 0 is the hardened model, 1 the base; above 1 the hardening is subtracted more than once. A bias that the base
lacks, as a parameter or attached to the model (a safety lock in either form), counts as 0 there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tunevax.attacks.context import AttackContext
from tunevax.attacks.kind import AttackConfig, NotApplicable
from tunevax.errors import UsageError, require
from tunevax.lineage import Lineage
from tunevax.mixins import option
from tunevax.modeling.biases import AddedBias, attach_biases, attached_biases
from tunevax.modeling.loading import load


@dataclass
class RollBackConfig(AttackConfig):
    """How far to move the weights, and towards which base."""

    dose_option = "dose"

    dose: float = option(1.0, "share of the hardening to undo")
    base: str | None = option(None, "the public base; default the model that it was hardened from")

    def __post_init__(self) -> None:
        require(self, "dose", at_least=0, at_most=10)

    def run(self, context: AttackContext) -> None:
        """Move the weights and score once, with both models in memory."""
        ref, base_ref = context.target["ref"], self.base or Lineage.of(context.target["ref"]).origin
        if base_ref == ref:
            raise NotApplicable(f"{context.target['label']} records no base to roll back to; give --base")
        loaded, o = context.load(), context.options
        base = load(base_ref, revision=o.revision, dtype=o.dtype, chat_template=o.chat_template)
        own, towards = dict(loaded.model.named_parameters()), dict(base.model.named_parameters())
        if missing := sorted(set(towards) - set(own)):
            raise UsageError(f"{base_ref} is no base of {ref}: parameter {missing[0]} is only in the base")
        with torch.no_grad():
            for name, parameter in own.items():
                if name not in towards and name.endswith(".bias"):
                    parameter.mul_(1 - self.dose)
                    continue
                if name not in towards or towards[name].shape != parameter.shape:
                    raise UsageError(f"{base_ref} is no base of {ref}: parameter {name} differs in shape")
                parameter.lerp_(towards[name].to(parameter.dtype), self.dose)
        for hook in (hook for module in loaded.model.modules() for hook in module._forward_hooks.values()):
            if isinstance(hook, AddedBias):
                hook.bias = hook.ready = hook.bias * (1 - self.dose)
        if base.info["attached"]:
            attach_biases(loaded.model, {i: b * self.dose for i, b in attached_biases(base.model).items()})
        del base, towards, own
        context.score(loaded.model, loaded.tokenizer, 0, suite=context.suite)
