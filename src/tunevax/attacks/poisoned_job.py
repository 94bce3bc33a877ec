"""The poisoned job: a customer of a fine-tuning service hides harmful rows in the training data, and the provider runs
the job with its defence (the threat model of arXiv 2402.01109 and 2405.18641).

Fine-tuning-stage defences are evaluated by it. The attacker controls the data only: the recorded job is run again with
its own method, options and safety rows, on `n` rows of which a share `p` is harmful.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tunevax.attacks.context import AttackContext, TargetOptions
from tunevax.attacks.finetune import Curve, work_of
from tunevax.attacks.kind import AttackConfig, NotApplicable, Work
from tunevax.data.mixing import harmful_rows, mix
from tunevax.data.roles import load_rows
from tunevax.data.safety import answers_in
from tunevax.errors import UsageError, require
from tunevax.finetuning.sft import FinetuneTrainer, JobConfig
from tunevax.lineage import Lineage
from tunevax.methods import load_method
from tunevax.mixins import option
from tunevax.modeling.trainer import ProgressCallback
from tunevax.records import RunRecord, Target, data_entry, read_prompts
from tunevax.training import other_data, replay

TRAINING = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "max_steps", "num_train_epochs", "weight_decay",
    "max_grad_norm", "per_device_train_batch_size", "gradient_accumulation_steps", "full_weights", "lora_r",
    "lora_alpha", "lora_dropout", "lora_targets", "max_length", "loss_on", "optim", "quantization",
)  # fmt: skip


@dataclass
class PoisonedJobConfig(AttackConfig):
    """The customer's data; the training is the provider's, as the target's run recorded it."""

    curve = True
    customer = True
    default_control = "none"  # the model that the job started from is no job itself

    p: float = option(0.1, "share of harmful rows")
    n: int | None = option(None, "rows of the job; default as many as the recorded one had")
    points: int = option(12, "scorings after step 0, at log-spaced steps up to the last")

    def __post_init__(self) -> None:
        require(self, "p", at_least=0, at_most=1, meaning="the share of harmful rows")
        require(self, "n", "points", at_least=1)

    def applies(self, targets: Sequence[Target], options: TargetOptions) -> str | None:
        """The control must be a job with the same training options: another learning rate would look like a defence."""
        for control in (target["ref"] for target in targets if target["role"] == "control"):
            record = Lineage.of(control).record
            if record.get("verb") != "finetune":
                raise UsageError(
                    f"{control} is no fine-tuning job, but a poisoned job is compared with one: give --control a run "
                    "of `tunevax finetune sft` on the same data"
                )
            for ref in (target["ref"] for target in targets if target["role"] == "model"):
                ours, theirs = Lineage.of(ref).record.get("config", {}), record["config"]
                if differ := [key for key in TRAINING if ours and ours.get(key) != theirs.get(key)]:
                    raise UsageError(
                        f"the job of {ref} has {differ[0]}={ours.get(differ[0])!r} and the control's "
                        f"{theirs.get(differ[0])!r}; train both alike, or the difference would look like a defence"
                    )
        return super().applies(targets, options)

    def used(self, ref: str) -> dict[str, list[str]]:
        """It starts from the parent of the recorded job, whose safety rows alone are used again."""
        lineage = Lineage.of(ref)
        if lineage.record.get("verb") != "finetune":
            return lineage.prompts
        below = Lineage.of(str(lineage.parent)).prompts
        safety = {*below.get("alignment", []), *read_prompts(Path(ref)).get("alignment", [])}
        return {**below, **({"alignment": sorted(safety)} if safety else {})}

    def work(self, ref: str) -> Work:
        """The job's steps, at the recorded seconds per step."""
        record, _, args, rows = self.job(ref)
        seconds = record["wall_seconds"] / max(1, record["steps"])
        return work_of(args, rows, self.points)._replace(step_seconds=seconds)

    def job(self, ref: str) -> tuple[RunRecord, type[FinetuneTrainer], JobConfig, int]:
        """The job to run again for the model `ref`: its run.json, trainer class, options with the attack's seed and
        folder, and number of rows. Raises `NotApplicable`: it is no fine-tuning job, or one that cannot be repeated."""
        record = Lineage.of(ref).record
        if record.get("verb") != "finetune":
            raise NotApplicable(f"{ref} is no fine-tuning job to run again; make one with `tunevax finetune METHOD`")
        if record["config"].get("screen") == "drop":
            raise NotApplicable(
                f"{ref} used data screening, which this attack does not repeat; run it without --screen"
            )
        trainer_class = load_method("tunevax.finetuning", str(record["method"]))
        changes = {"output_dir": self.output_dir, "seed": self.seed, "data_seed": None, "save_strategy": "no"}
        args = replay(record, trainer_class.config_class, **changes)
        rows = self.n or next(entry["rows"] for entry in record["data"] if entry["role"] == "task")
        return record, trainer_class, args, rows

    def run(self, context: AttackContext) -> None:
        """Run the job again on poisoned rows, and score along the way."""
        ref = context.target["ref"]
        record, trainer_class, args, count = self.job(ref)
        rows = mix(context.task, harmful_rows(context.harmful), self.p, count, self.seed)
        safety = None
        if answers := answers_in(trainer_class.needs):
            source = record["config"]["safety_data"]
            safety = load_rows("alignment", source, answers, str(record["method"]))
            if changed := other_data(record, [data_entry("alignment", source, safety)]):
                raise NotApplicable(f"{ref} cannot be run again: {changed}; restore the old data")
        how = {k: record["config"].get(k) for k in ("dtype", "revision", "quantization")}
        loaded = context.load(ref=Lineage.of(ref).parent, **how)
        curve = Curve(context, loaded.tokenizer, self.points, 0, args)
        data = {"safety_data": safety, "task_data": rows}
        callbacks = [ProgressCallback(f"attack {context.target['label']}"), curve]
        trainer = trainer_class(loaded.model, args, **data, processing_class=loaded.tokenizer, callbacks=callbacks)
        context.record.update(trainer.coverage)
        curve.rows = len(trainer.train_dataset)  # with the safety rows that some methods add
        trainer.train()
