"""Another chat template at test time, without any training (arXiv 2412.07097, 2402.18540).

Safety trained with one form of prompt may not transfer to another.
"""

from __future__ import annotations

from dataclasses import dataclass

from tunevax.attacks.context import AttackContext
from tunevax.attacks.kind import AttackConfig
from tunevax.mixins import option


@dataclass
class TemplateConfig(AttackConfig):
    """The template to use."""

    customer = True

    template: str = option("none", "alpaca, plain, none (the bare prompt), or a jinja file")

    def run(self, context: AttackContext) -> None:
        """Score the model with the other template."""
        loaded = context.load(chat_template=self.template)
        context.score(loaded.model, loaded.tokenizer, 0, suite=context.suite)
