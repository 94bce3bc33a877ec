"""Another chat template at test time, without any training (arXiv 2412.07097, 2402.18540).

Safety that was taught in one form of prompt may not hold in another.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tunevax.attacks.attack import AttackConfig, Bench


@dataclass
class TemplateConfig(AttackConfig):
    """Which template."""

    template: str = field(default="none", metadata={"help": "alpaca, plain, none (the bare prompt), or a jinja file"})

    needs = frozenset()

    def run(self, bench: Bench) -> None:
        """Score the model, asked in the other template."""
        loaded = bench.load(chat_template=self.template)
        bench.score(loaded.model, loaded.tokenizer, 0, suite=bench.suite)
