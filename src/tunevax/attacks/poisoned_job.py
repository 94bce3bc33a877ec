"""The poisoned job: the customer of a fine-tuning service hides harmful rows among those to train on, and the provider
runs the job, with its defence (the threat of arXiv 2402.01109 and 2405.18641).

It is the attack that a fine-tuning-stage defence is judged by. The attacker has the data and nothing else: what the
run trained is trained again, by the run's own method, options and safety rows, on `n` rows, a share `p` harmful.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from tunevax.attacks.attack import AttackConfig, Bench, NotApplicable
from tunevax.attacks.finetune import Curve
from tunevax.data.mixing import mix
from tunevax.data.safety import load_safety
from tunevax.errors import UsageError
from tunevax.methods import load_method
from tunevax.modeling.progress import ProgressCallback
from tunevax.runs import is_run, read_run


@dataclass
class PoisonedJobConfig(AttackConfig):
    """What the customer hands in; the training is the provider's, as the target's run recorded it."""

    p: float = field(default=0.1, metadata={"help": "share of harmful rows"})
    n: int = field(default=1000, metadata={"help": "rows of the job"})
    points: int = field(default=12, metadata={"help": "scorings after step 0, at log-spaced steps up to the last"})

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise UsageError(f"p, the share of harmful rows, is {self.p}; it must be between 0 and 1")
        for name in ("n", "points"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least 1")

    @property
    def needs(self) -> set[str]:
        """The data it draws from."""
        return {*(["harmful"] if self.p > 0 else []), *(["task"] if self.p < 1 else [])}

    def job(self, ref: str) -> tuple[dict[str, Any], type, Any]:
        """Of the run `ref`: its record, its trainer class, and its options with this attack's seed and folder.

        Raises:
            NotApplicable: it is no fine-tuning job.
        """
        record = read_run(ref) if is_run(ref) else {}
        if record.get("verb") != "finetune":
            raise NotApplicable(
                f"{ref} is no fine-tuning job that could be run again; make one with `tunevax finetune METHOD`"
            )
        trainer_class = load_method("tunevax.finetuning", record["method"])
        names = {f.name for f in dataclasses.fields(trainer_class.config_class) if f.init}
        values = {k: v for k, v in record["config"].items() if k in names and not k.startswith(("hub_", "push_to_hub"))}
        values |= {"output_dir": self.output_dir, "seed": self.seed, "data_seed": None, "save_strategy": "no"}
        return record, trainer_class, trainer_class.config_class(**values)

    def run(self, bench: Bench) -> None:
        """Run the job again on poisoned rows, and score along the way."""
        record, trainer_class, args = self.job(bench.target["ref"])
        harmful = [{**row, "completion": row["rejected"], "harmful": True} for row in bench.harmful]
        rows = mix(bench.task, harmful, self.p, self.n, self.seed)
        safety = None
        if trainer_class.needs:
            safety = load_safety(record["config"]["safety_data"], "alignment", trainer_class.needs, record["method"])
        loaded = bench.load(ref=record["parent"] or record["model"]["ref"])
        curve = Curve(bench, loaded.tokenizer, self.points, len(rows), args)
        callbacks = [ProgressCallback(f"attack {bench.target['label']}"), curve]
        trainer_class(loaded.model, args, rows, loaded.tokenizer, safety, callbacks).train()
