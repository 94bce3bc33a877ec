"""Linear probes for many attention heads at once: L2-regularised logistic regression by Newton's method.

    minimise over w, b:   ||w||^2 / 2 + sum_i log(1 + exp(-s_i (w.x_i + b))),    s_i = +1 safe, -1 unsafe

This is scikit-learn's LogisticRegression at its defaults, solved to the optimum for all heads of a block together.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tunevax.errors import UsageError

FOLDS = 5


def fit(x: torch.Tensor, safe: torch.Tensor, steps: int = 50) -> torch.Tensor:
    """Weights of the probes, the intercept last, [heads, d + 1].

    Args:
        x: [heads, n, d], fp64.
        safe: [n], bool.
    """
    x = _with_one(x)
    penalty = torch.ones(x.shape[-1], dtype=x.dtype, device=x.device)
    penalty[-1] = 0
    sign = safe.to(x.dtype) * 2 - 1
    ridge = torch.diag(penalty.clamp(min=1e-9))

    def loss_of(w: torch.Tensor) -> torch.Tensor:
        margins = sign * torch.einsum("hnd,hd->hn", x, w)
        return torch.nn.functional.softplus(-margins).sum(1) + (penalty * w * w).sum(1) / 2

    w = x.new_zeros(x.shape[0], x.shape[-1])
    loss = loss_of(w)
    for _ in range(steps):
        p = torch.sigmoid(torch.einsum("hnd,hd->hn", x, w))
        gradient = torch.einsum("hnd,hn->hd", x, p - safe.to(x.dtype)) + penalty * w
        if gradient.abs().max() < 1e-6:
            break
        hessian = (x * (p * (1 - p)).unsqueeze(-1)).transpose(1, 2) @ x + ridge
        step = torch.linalg.solve(hessian, gradient)
        size = torch.ones_like(loss)
        for _ in range(20):  # a full step may overshoot where the classes are far apart
            new = loss_of(w - size.unsqueeze(-1) * step)
            worse = new > loss + 1e-12 * loss.abs()
            if not worse.any():
                break
            size = torch.where(worse, size / 2, size)
        w = w - size.unsqueeze(-1) * step
        loss = new
    return w


def hits(w: torch.Tensor, x: torch.Tensor, safe: torch.Tensor) -> torch.Tensor:
    """How many of the vectors each probe classifies correctly, [heads]."""
    return ((torch.einsum("hnd,hd->hn", _with_one(x), w) > 0) == safe).sum(1)


def grouped_accuracy(x: torch.Tensor, safe: torch.Tensor, groups: Sequence[str], seed: int) -> np.ndarray:
    """Accuracy on prompts the probe was not fitted to, over `FOLDS` folds, [heads].

    Args:
        x: [heads, n, d].
        groups: n prompts, or hashes of them; all vectors of one are in the same fold.
    """
    names = sorted(set(groups))
    if len(names) < 2:
        raise UsageError("all pairs have the same prompt and probes are validated on other prompts; give more pairs")
    folds = min(FOLDS, len(names))
    order = np.random.default_rng(seed).permutation(len(names))
    place = {names[i]: position % folds for position, i in enumerate(order)}
    fold = torch.tensor([place[g] for g in groups], device=x.device)
    x, right = x.double(), torch.zeros(len(x), dtype=torch.long, device=x.device)
    for i in range(folds):
        held = fold == i
        right = right + hits(fit(x[:, ~held], safe[~held]), x[:, held], safe[held])
    return right.cpu().numpy() / len(groups)


def official_accuracy(x: torch.Tensor, safe: torch.Tensor, seed: int) -> np.ndarray:
    """The published score, [heads]: the mean of training and validation accuracy on a random 60/40 split of vectors."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(safe))).to(x.device)
    train, held = order[: int(0.6 * len(order))], order[int(0.6 * len(order)) :]
    x = x.double()
    w = fit(x[:, train], safe[train])
    shares = [hits(w, x[:, part], safe[part]) / len(part) for part in (train, held)]
    return ((shares[0] + shares[1]) / 2).cpu().numpy()


def _with_one(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(x, (0, 1), value=1.0)
