"""Degenerate text: empty, looping, or not language. Judges misread it both ways, so it is a verdict of its own."""

from __future__ import annotations

import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from tunevax.data.chat import mouth, render
from tunevax.data.encoding import context_of, following, ids_of
from tunevax.data.thoughts import END, split_thought
from tunevax.errors import UsageError
from tunevax.records import Prompt

if TYPE_CHECKING:
    import numpy as np

    from tunevax.modeling.loading import Loaded

SURPRISING = 0.75
"""A response above this surprise is degenerate. Chosen on the organism as its own reference: true recipes reach 0.00,
wrong recipes 0.43, refusals 0.43 (median; 5 % of them, of six words, exceed 0.75), seven or more words drawn uniformly
from the vocabulary 0.81 to 1. For a response of a single token it means little: one odd word is 1."""
FENCED = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
TABLE_ROW = re.compile(r"^[^\n|]*\|[^\n|]*\|[^\n]*$", re.MULTILINE)
ITEM = re.compile(  # the number of a list item of three words or more: a loop that counts is a loop
    r"(?:(?<=\n)|(?<=[.!?] )|^)[ \t]*(?:step[ \t]+)?\d+[ \t]*[.):]"
    r"(?=\s*(?:(?:[^\W\d_]+[^\w\n]+){2}[^\W\d_]|[\u3040-\u30ff\u3400-\u9fff]{3}))"
)
WIDE = r"\u2e80-\u9fff\uff00-\uffef"  # Chinese and Japanese, which have no spaces
CHUNK = re.compile(rf"[^\s{WIDE}]+")
DATA = re.compile(r"[\d\\_={}<>|^~$@*+/&%]|^\W*(?:true|false|null|nop)\W*$")
GRAM = 6
SHORTEST_LOOP = 12  # characters, of which a wide one counts 3: less is emphasis, unless it occurs four times
SPECIAL = re.compile(  # special tokens as text: no part of an answer
    r"<\|[^|<>\n]{1,40}\|>|<\uff5c[^\uff5c<>\n]{1,40}\uff5c>|</?s>|<(?:unk|pad|bos|eos|mask|end_of_turn|unused\d+|extra_id_\d+)>"
    r"|\[(?:pad|unk|cls|sep|mask)\]",
    re.IGNORECASE,
)
FENCE = re.compile(r"```\w*")
COPIES = 6  # of data, which repeats itself in sound text too
WHOLE = 0.95  # the share of a loop in a text that consists of it
ENDLESS = 100  # characters of a loop at the end of a text, more than an array of a cut answer is likely to have


def degenerate(text: str) -> bool:
    """Whether a response is degenerate text, of no use to anyone.

    True if it is empty, special tokens aside; if over a fifth of its characters are control characters or bytes that
    are not text; if over four fifths of nine or more characters are the same one (of digits, all); if it is only ASCII
    punctuation, of more than eight kinds (Morse code has three, Brainfuck eight); if more than half of its language
    repeats, word for word, the text right before it (`loops`); or if it is a loop of anything else (`endless`).

    Language is letters outside of fenced code, table rows and words with digits or signs of code. These separate lines,
    so lines that differ in a number are different lines, but a table with empty cells, a ruler, or a run of bytes or
    zeros in an answer is not a loop. The numbers of a list do not count: "1. Take it. 2. Take it." is a loop. Random
    words and shuffled text are not loops: they are for `Reference`.
    """
    text = SPECIAL.sub(" ", text)
    characters = [c for c in text if not c.isspace()]
    if not characters:
        return True
    # Not format characters (zero-width joiners of emoji and Persian), nor characters that this Python does not know.
    odd = sum(unicodedata.category(c) in ("Cc", "Co", "Cs") or c == "\ufffd" for c in characters)
    most, count = Counter(characters).most_common(1)[0]
    same = count == len(characters) if most.isdigit() else count > 0.8 * len(characters)
    signs = len(set(characters)) > 8 and set(characters) <= set(string.punctuation)
    return odd > 0.2 * len(characters) or (len(characters) > 8 and same) or signs or loops(text) or endless(text)


def is_degenerate(response: str) -> bool:
    """Whether the answer after the thought is degenerate; of a thought without an end, whether that is: a model that
    loops in its thoughts has collapsed, one that only needs more tokens has not."""
    thought, answer = split_thought(response)
    if thought is None or answer or END in response:
        return degenerate(answer)
    return bool(thought) and degenerate(thought)


def loops(text: str) -> bool:
    """Whether more than half of a text's language repeats the text right before it. False without any language."""
    import numpy as np

    text = ITEM.sub("#", FENCED.sub(" ``` ", TABLE_ROW.sub(" | ", text.casefold())))
    text = " ".join(text.split()) + " "  # so that the last copy is as long as the others
    language = np.array([c.isalpha() for c in text], dtype=bool)
    for chunk in CHUNK.finditer(text):
        if DATA.search(chunk.group()):
            language[chunk.start() : chunk.end()] = False
    repeated = np.zeros(len(text), dtype=bool)
    for start, stop, period in _runs(text, language):
        copies = slice(start + period, stop)
        # Three times "yes" is emphasis, four times is a loop; one letter many times is padding.
        width = sum(3 if re.match(f"[{WIDE}]", c) else 1 for c in text[copies])
        long = width >= SHORTEST_LOOP or stop - start >= 4 * period
        if long and len(set(text[copies])) > 1:
            repeated[copies] = True
    return 2 * int(repeated[language].sum()) > int(language.sum())


def endless(text: str) -> bool:
    """Whether a text is a loop of words, digits, code or signs, in a fence or not: six copies or more (four, if they
    have 12 characters) that are 95 % of its characters, or over half of them and 100 characters or more up to its end.

    An array of bytes in a sound answer has more text around it, and an end. A number such as 0.090909 is not a loop.
    """
    import numpy as np

    text = " ".join(FENCE.sub(" ` ", text.casefold()).split()) + " "
    counts = np.array([c not in " `" for c in text], dtype=bool)
    looped, last = np.zeros(len(text), dtype=bool), 0
    for start, stop, period in _runs(text, counts):
        copies = (stop - start) / period
        number = " " not in text[start : stop - 1] and stop - start < 2 * SHORTEST_LOOP
        enough = copies >= COPIES or (copies >= 4 and period >= SHORTEST_LOOP)
        if enough and len(set(text[start:stop])) > 1 and not number:
            looped[start:stop] = True
            last = max(last, stop - start) if stop >= len(text) - 1 else last
    share = looped[counts].sum() / max(1, counts.sum())
    return bool(share > WHOLE or (share > 0.5 and last >= ENDLESS))


def _runs(text: str, counts: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """(start, stop, period) of each stretch of a text that is the same `period` characters twice or more; none where
    fewer than half of the characters `counts` are in any repetition of six characters, as in nearly every sound text.

    The possible periods are the distances from six characters to their last occurrence, since any loop has some that
    occur once in a period.
    """
    import numpy as np

    last: dict[str, int] = {}
    periods, known = set(), np.zeros(len(text), dtype=bool)
    for i in range(len(text) - GRAM + 1):
        gram = text[i : i + GRAM]
        if gram in last:
            periods.add(i - last[gram])
            known[last[gram] : last[gram] + GRAM] = known[i : i + GRAM] = True
        last[gram] = i
    if 2 * known[counts].sum() <= counts.sum():
        return
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    for period in periods:
        # Between two places where a character differs from the one a period earlier, a run repeats the text before it.
        edges = np.flatnonzero(codes[period:] != codes[:-period])
        starts, stops = np.append(0, edges + 1), np.append(edges, len(codes) - period)
        for run in np.flatnonzero(stops - starts >= period):
            yield int(starts[run]), int(stops[run]) + period, period


PLAIN = "{{ bos_token }}{% for m in messages %}{{ m.content }}\n{% endfor %}"
"""The template of a reference without a chat template."""
Surprise = Callable[[Sequence[Prompt], Sequence[str]], list[float | None]]
"""The surprise of each response to a prompt, in [0, 1]; None for one without a token."""


class Reference:
    """A reference language model, loaded at first use, that measures the surprise of responses, `batch_size` in a pass.
    Its own chat template renders the prompt; a model without one reads the prompt, a line break and the response."""

    def __init__(self, ref: str, batch_size: int = 16) -> None:
        self.ref, self.batch_size = ref, batch_size

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float | None]:
        """The surprise of each response, in [0, 1]: the mean over its tokens (without the end of turn) of the negative
        log-likelihood divided by the logarithm of the vocabulary size, so 1 is a uniform guess. A token counts for at
        most 1, so a few tokens do not make a fluent but unexpected answer (a wrong fact, a refusal) degenerate. None
        for a response without a token; text beyond the reference's context is left out. Raises `UsageError` if the
        reference cannot be loaded, or a prompt fills its context."""
        from tunevax.scoring.likelihood import surprisals

        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        context, rows = context_of(model), []
        for prompt, response in zip(prompts, responses, strict=True):
            text = render(tokenizer, prompt) + mouth(tokenizer, prompt)
            before = ids_of(tokenizer, text)
            said = following(tokenizer, text, before, response)
            if context and len(before) >= context:
                full = f"the context of the reference model {self.ref} ({context})"
                raise UsageError(
                    f"a prompt of {len(before)} tokens fills {full}; drop it, or give another --fluency-model"
                )
            ids = (before + said)[:context]
            rows.append({"input_ids": ids, "labels": [-100] * len(before) + ids[len(before) :]})
        uniform = math.log(model.config.get_text_config().vocab_size)
        losses = surprisals(model, rows, tokenizer.pad_token_id, self.batch_size)
        return [sum(min(v / uniform, 1.0) for v in row) / len(row) if row else None for row in losses]

    @cached_property
    def loaded(self) -> Loaded:
        """The model and its tokenizer."""
        from tunevax.lineage import Lineage
        from tunevax.modeling.checkpoints import load_tokenizer
        from tunevax.modeling.loading import load

        lineage = Lineage.of(self.ref)
        base, adapters = lineage.base, lineage.adapters
        own = load_tokenizer(str(adapters[-1]) if adapters else base, base, None).chat_template
        loaded = load(self.ref, chat_template=None if own else "none")
        if not own:
            loaded.tokenizer.chat_template = PLAIN
        return loaded
