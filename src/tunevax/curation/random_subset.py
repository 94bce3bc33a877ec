"""Random subset: the comparison every selector has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from tunevax.mixins import option

if TYPE_CHECKING:
    from tunevax.curation.curate import Pool


@dataclass
class RandomSelector:
    """A score drawn for each row, from the seed alone."""

    output_dir: str | None = option(None, "the run folder to write")
    seed: int = option(42, "of the scores")

    needs: ClassVar[frozenset[str]] = frozenset()
    paper: ClassVar[str] = ""

    def score(self, pool: Pool) -> np.ndarray:
        """Independent numbers in [0, 1), [rows]; a row's number depends on the seed and its place only."""
        # RandomState: its stream is frozen by numpy's policy, so a seed means the same rows in every version.
        return np.random.RandomState(self.seed).random_sample(len(pool.rows))
