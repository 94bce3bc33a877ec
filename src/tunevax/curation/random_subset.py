"""A random subset, which every selector must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tunevax.curation.curate import Pool
from tunevax.mixins import option


@dataclass
class RandomSelector:
    """A score drawn for each row, from the seed alone."""

    output_dir: str | None = option(None, "the run folder to write")
    seed: int = option(42, "of the scores")
    needs: ClassVar[frozenset[str]] = frozenset()
    paper: ClassVar[str] = ""

    def score(self, pool: Pool) -> np.ndarray:
        """Independent numbers in [0, 1), [rows]; a row's number depends on the seed and its position only."""
        # numpy has frozen RandomState's stream, so a seed gives the same rows in every version.
        return np.random.RandomState(self.seed).random_sample(len(pool.rows))
