"""The answer is prefilled with its first words, without any training (arXiv 2406.05946).

Refusals depend on the first few tokens. The paper prefills the first tokens of a harmful answer to the same prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from tunevax.attacks.context import AttackContext
from tunevax.attacks.kind import AttackConfig, NotApplicable
from tunevax.data.encoding import ids_of
from tunevax.mixins import option
from tunevax.records import Example

TOKENS = 5  # prefilled tokens of a prompt's own harmful answer, at most half of it: the fewest in the paper


@dataclass
class PrefillConfig(AttackConfig):
    """How the answer begins."""

    customer = True

    text: str | None = option(None, "the first words; default those of most harmful answers, or of the prompt's own")

    @property
    def needs(self) -> set[str]:
        """The data it draws from."""
        return set() if self.text else {"harmful"}

    def run(self, context: AttackContext) -> None:
        """Score the model with prefilled answers. Raises `NotApplicable`: there is no text, no shared opening, and a
        prompt without a harmful answer."""
        loaded = context.load()
        text = self.text or common_opening([str(row["rejected"]) for row in context.harmful])
        prefix = text or own_openings(context.suite.harmful, loaded.tokenizer)
        context.score(loaded.model, loaded.tokenizer, 0, suite=context.suite._replace(prefix=prefix))


def common_opening(answers: Sequence[str], longest: int = 8) -> str:
    """The longest opening, up to `longest` words, that half of the answers share; empty if there is none."""
    best = ""
    for length in range(1, longest + 1):
        openings = Counter(" ".join(words[:length]) for words in (a.split() for a in answers) if len(words) > length)
        opening, count = openings.most_common(1)[0] if openings else ("", 0)
        if 2 * count < len(answers) or not opening:
            break
        best = opening
    return best


def own_openings(rows: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The first `TOKENS` tokens of the harmful answer in each row, at most half of it, as text. Raises `NotApplicable`:
    a row has none."""
    openings = []
    for row in rows:
        answer = row.get("rejected")
        if not answer:
            raise NotApplicable(
                f"{row.get('place') or 'a prompt'}: harmful answers share no opening, and this prompt has no "
                "`rejected` to take the opening from; give the words (--text, or text in a protocol)"
            )
        ids = ids_of(tokenizer, answer.strip())
        openings.append(str(tokenizer.decode(ids[: max(1, min(TOKENS, len(ids) // 2))], skip_special_tokens=True)))
    return openings
