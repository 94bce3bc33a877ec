"""Taking a safety lock off: whoever holds the weights can subtract the bias again, or never load it (arXiv 2410.10343
adds it to a finished fine-tune, and nothing ties it there). No training, no data."""

from __future__ import annotations

from dataclasses import dataclass

from tunevax.attacks.attack import AttackConfig, Bench, NotApplicable
from tunevax.lineage import Lineage


@dataclass
class UnlockConfig(AttackConfig):
    """Nothing to choose: the model is scored as it was before the lock."""

    @property
    def needs(self) -> set[str]:
        """It needs no data."""
        return set()

    def run(self, bench: Bench) -> None:
        """Score the model without its lock."""
        ref = bench.target["ref"]
        if not has_lock(ref):
            raise NotApplicable(f"{ref} has no safety lock to take off")
        loaded = bench.load(ref=Lineage.of(ref).parent)
        bench.score(loaded.model, loaded.tokenizer, 0)


def has_lock(ref: str) -> bool:
    """Whether a model is a run of `tunevax restore safetylock`."""
    record = Lineage.of(ref).record
    return (record.get("verb"), record.get("method")) == ("restore", "safetylock")
