"""Sink attention: how much of each head's attention goes to the first token, with a graph.

With A[i, j] the attention of query i on key j after the softmax, k the sink token and N the valid queries i > k that
can see k, the sink value of a head on a text and the sink divergence of arXiv 2602.05228 (Eq. 2 and 3) are

    alpha_h(X) = mean over i in N of A_h[i, k],        d_h = alpha_h(X_harmful) - alpha_h(X_refusal)

and the regulariser (Eq. 4) is the mean over heads of ReLU(d_h).

A query spreads its attention over all tokens up to its own, so A[i, k] falls as i grows, whatever the text says: over
all queries (`all`, the paper's form) the longer of two texts has the smaller alpha, and d_h is mostly the difference of
their lengths. With `common`, N holds the first m tokens of either answer, m being the number of tokens that both have
(the template's end not counted): an answer compared with itself cut short has d_h = 0. Of two answers to the same
prompt these are the same positions.

Two ways to alpha_h:

- `eager`: eager attention forms A, [rows, heads, tokens, tokens] per layer, and keeps it for the backward pass.
- `linear`: the model keeps its own attention. A[i, k] = exp(s_ik - logsumexp_j s_ij) is computed beside it from the
  very queries and keys that the attention gets (rotary embedding and norms applied), a chunk of queries at a time,
  forward and backward. Memory grows linearly with tokens, as that of SDPA and flash attention; a model that can only
  do eager attention (Gemma 2: soft cap) still forms A for its output.

Heads are query heads, also with grouped keys. In a sliding-window layer N holds only the queries that can see k.
Learned sinks (a logit in the softmax that is no token's) are refused: rows of A do not add up to 1, and what the
first token gets is not what the paper measures.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

QUERIES = ("common", "all")
QUERIES_HELP = "common (the answer positions that both answers of a pair have), or all (as published)"


def common_queries(
    harmful: Sequence[tuple[int, int]], refusals: Sequence[tuple[int, int]], tokens: int
) -> torch.Tensor:
    """The first m tokens of the answers of each pair, m the length of the shorter one, as booleans [rows, tokens]: of
    the harmful texts and then of as many refusals, whose answers lie at these spans."""
    lengths = [min(b - a, d - c) for (a, b), (c, d) in zip(harmful, refusals, strict=True)]
    mask = torch.zeros(2 * len(lengths), tokens, dtype=torch.bool)
    for row, ((start, _), length) in enumerate(zip([*harmful, *refusals], [*lengths, *lengths], strict=True)):
        mask[row, start : start + length] = True
    return mask


def divergence(values: torch.Tensor) -> torch.Tensor:
    """d [layers, heads] from the sink values [rows, layers, heads] of the harmful texts and then as many refusals."""
    harmful, refusal = values.chunk(2)
    return harmful.mean(0) - refusal.mean(0)
