"""A poisoned fine-tune with a kind of harm that the hardening never saw (arXiv 2402.16382, cross-domain).

It is scored on that kind of harm. The categories are held out at hardening with `--safety-data
FILE:held_out=CATEGORY+CATEGORY`; half of their prompts are the attacker's, the other half the exam.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tunevax.attacks.attack import Bench, NotApplicable
from tunevax.attacks.finetune import FinetuneConfig
from tunevax.data.mixing import mix
from tunevax.data.safety import load_safety
from tunevax.data.splits import drawn, prompt_hash
from tunevax.errors import UsageError
from tunevax.runs import is_run, read_run
from tunevax.scoring.score import Exam, used_prompts


@dataclass
class HeldOutCategoryConfig(FinetuneConfig):
    """Options as in `FinetuneConfig`."""

    @property
    def needs(self) -> set[str]:
        """The data it draws from: the held-out rows are read apart."""
        return super().needs - {"harmful"}

    def rows(self, bench: Bench) -> list[dict[str, Any]]:
        """As the poisoned fine-tune, with harmful rows of held-out categories."""
        held = [{**row, "completion": row["rejected"]} for row in self.held_out(bench, "held-out-attack")]
        return mix(bench.task, held, self.p, self.n, self.seed)

    def exam(self, bench: Bench) -> Exam:
        """The bench's exam on prompts of held-out categories."""
        return bench.exam._replace(harmful=drawn(self.held_out(bench, "held-out-evaluation"), bench.options.limit))

    def held_out(self, bench: Bench, split: str) -> list[dict[str, Any]]:
        """The rows of one half of the held-out categories.

        Raises:
            NotApplicable: no category is held out, or the model was hardened with one of them.
        """
        try:
            rows = load_safety(str(bench.options.safety_data), split, ("rejected",), "an attack")
        except UsageError as error:
            raise NotApplicable(str(error)) from error
        seen = hardened_with(bench.target["ref"]) & {row["category"] for row in rows}
        if seen:
            raise NotApplicable(f"{bench.target['label']} was hardened with the category {sorted(seen)[0]!r}")
        used = {h for hashes in used_prompts(bench.target["ref"]).values() for h in hashes}
        shared = sum(prompt_hash(row["prompt"]) in used for row in rows)
        if shared:
            raise NotApplicable(f"{bench.target['label']} was hardened with {shared} of the held-out prompts")
        return rows


def hardened_with(ref: str) -> set[str]:
    """The harm categories that a run and its parents were aligned with; empty for a plain model."""
    seen: set[str] = set()
    while ref and is_run(ref):
        record = read_run(ref)
        seen |= {
            c for entry in record.get("data", []) if entry["role"] == "alignment" for c in entry.get("categories") or []
        }
        ref = record.get("parent") or record.get("model", {}).get("ref", "")
    return seen
