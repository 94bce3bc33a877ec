"""The first words of the answer are put into the model's mouth, without any training (arXiv 2406.05946).

Refusals live in the first few tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from tunevax.attacks.attack import AttackConfig, Bench


@dataclass
class PrefillConfig(AttackConfig):
    """What the answer begins with."""

    text: str | None = field(
        default=None, metadata={"help": "the first words; default what most harmful answers of the attack split share"}
    )

    @property
    def needs(self) -> set[str]:
        """The data it draws from."""
        return set() if self.text else {"harmful"}

    def run(self, bench: Bench) -> None:
        """Score the model, which has to go on from the given words."""
        loaded = bench.load()
        text = self.text or common_opening([row["rejected"] for row in bench.harmful])
        bench.score(loaded.model, loaded.tokenizer, 0, exam=bench.exam._replace(prefix=text))


def common_opening(answers: Sequence[str], longest: int = 8) -> str:
    """The longest opening, up to `longest` words, that half of the answers share; else the most common first word."""
    best = ""
    for length in range(1, longest + 1):
        openings = Counter(" ".join(words[:length]) for words in (a.split() for a in answers) if len(words) > length)
        if not openings:
            break
        opening, count = openings.most_common(1)[0]
        if best and 2 * count < len(answers):
            break
        best = opening
        if 2 * count < len(answers):
            break
    return best
