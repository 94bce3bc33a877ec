"""The poisoned job: the customer of a fine-tuning service hides harmful rows among those to train on, and the provider
runs the job, with its defence (the threat of arXiv 2402.01109 and 2405.18641).

It is the attack that a fine-tuning-stage defence is judged by. The attacker has the data and nothing else: what the
run trained is trained again, by the run's own method, options and safety rows, on `n` rows, a share `p` harmful.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tunevax.attacks.context import AttackContext, TargetOptions
from tunevax.attacks.finetune import Curve, work_of
from tunevax.attacks.kind import AttackConfig, NotApplicable, Work
from tunevax.data.mixing import harmful_rows, mix
from tunevax.data.roles import load_rows
from tunevax.data.safety import answers_in
from tunevax.errors import UsageError, require
from tunevax.lineage import Lineage
from tunevax.methods import load_method
from tunevax.mixins import option
from tunevax.modeling.callbacks import ProgressCallback
from tunevax.records import RunRecord, data_entry, read_prompts
from tunevax.training import other_data, replay

if TYPE_CHECKING:
    from tunevax.finetuning.sft import FinetuneTrainer, JobConfig


@dataclass
class PoisonedJobConfig(AttackConfig):
    """What the customer hands in; the training is the provider's, as the target's run recorded it."""

    curve = True
    customer = True
    default_control = "none"  # what the job started from is no job

    p: float = option(0.1, "share of harmful rows")
    n: int | None = option(None, "rows of the job; default as many as the recorded one had")
    points: int = option(12, "scorings after step 0, at log-spaced steps up to the last")

    def __post_init__(self) -> None:
        require(self, "p", at_least=0, at_most=1, meaning="the share of harmful rows")
        require(self, "n", "points", at_least=1)

    def applies(self, targets: Sequence[Mapping[str, Any]], options: TargetOptions) -> str | None:
        """The control must be a job, and trained as the models' jobs are."""
        refs = {role: [t["ref"] for t in targets if t["role"] == role] for role in ("control", "model")}
        for control in refs["control"]:
            require_like_jobs(refs["model"], control)
        return super().applies(targets, options)

    def used(self, ref: str) -> dict[str, list[str]]:
        """It begins below the recorded job: of the rows of that, only the provider's safety rows are used again."""
        lineage = Lineage.of(ref)
        if lineage.record.get("verb") != "finetune":
            return lineage.prompts
        below = Lineage.of(str(lineage.parent)).prompts
        safety = {*below.get("alignment", []), *read_prompts(Path(ref)).get("alignment", [])}
        return {**below, **({"alignment": sorted(safety)} if safety else {})}

    def work(self, ref: str) -> Work:
        """The job's steps, each as long as it took."""
        record, _, args, rows = self.job(ref)
        seconds = record["wall_seconds"] / max(1, record["steps"])
        return work_of(args, rows, self.points)._replace(step_seconds=seconds)

    def job(self, ref: str) -> PoisonedJob:
        """What is run again for the model `ref`.

        Raises:
            NotApplicable: it is no fine-tuning job, or one that cannot be run again as it was.
        """
        record = Lineage.of(ref).record
        if record.get("verb") != "finetune":
            raise NotApplicable(
                f"{ref} is no fine-tuning job that could be run again; make one with `tunevax finetune METHOD`"
            )
        if record["config"].get("screen") == "drop":
            raise NotApplicable(
                f"{ref} dropped rows at the door, which is not done again here; run it without --screen"
            )
        trainer_class = load_method("tunevax.finetuning", str(record["method"]))
        changes = {"output_dir": self.output_dir, "seed": self.seed, "data_seed": None, "save_strategy": "no"}
        args = replay(record, trainer_class.config_class, **changes)
        rows = self.n or next(entry["rows"] for entry in record["data"] if entry["role"] == "task")
        return PoisonedJob(record, trainer_class, args, rows)

    def run(self, context: AttackContext) -> None:
        """Run the job again on poisoned rows, and score along the way."""
        record, trainer_class, args, count = self.job(context.target["ref"])
        rows = mix(context.task, harmful_rows(context.harmful), self.p, count, self.seed)
        safety = None
        if answers := answers_in(trainer_class.needs):
            source = record["config"]["safety_data"]
            safety = load_rows("alignment", source, answers, str(record["method"]))
            if changed := other_data(record, [data_entry("alignment", source, safety)]):
                raise NotApplicable(f"{context.target['ref']} cannot be run again: {changed}; put the old data back")
        how = {k: record["config"].get(k) for k in ("dtype", "revision", "quantization")}
        loaded = context.load(ref=Lineage.of(context.target["ref"]).parent, **how)
        curve = Curve(context, loaded.tokenizer, self.points, 0, args)
        callbacks = [ProgressCallback(f"attack {context.target['label']}"), curve]
        trainer = trainer_class(
            loaded.model, args, safety_data=safety, task_data=rows, processing_class=loaded.tokenizer,
            callbacks=callbacks,
        )  # fmt: skip
        context.record.update(trainer.coverage)
        curve.rows = len(trainer.train_dataset)  # with the safety rows that some methods add
        trainer.train()


class PoisonedJob(NamedTuple):
    """A recorded job: its run.json, its trainer class, its options with the attack's seed and folder, and its rows."""

    record: RunRecord
    trainer_class: type[FinetuneTrainer]
    args: JobConfig
    rows: int


TRAINING = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "max_steps", "num_train_epochs", "weight_decay",
    "max_grad_norm", "per_device_train_batch_size", "gradient_accumulation_steps", "full_weights", "lora_r",
    "lora_alpha", "lora_dropout", "lora_targets", "max_length", "loss_on", "optim", "quantization",
)  # fmt: skip


def require_like_jobs(models: Sequence[str], control: str) -> None:
    """Raise `UsageError` unless the control is a job, and trained as the models' jobs are: another learning rate would
    pass for a defence."""
    theirs = Lineage.of(control).record
    if theirs.get("verb") != "finetune":
        raise UsageError(
            f"{control} is no fine-tuning job, and a poisoned job is compared with one: give --control a run of "
            "`tunevax finetune sft` on the same data"
        )
    for ref in models:
        ours = Lineage.of(ref).record.get("config", {})
        for key in TRAINING if ours else ():
            if ours.get(key) != theirs["config"].get(key):
                raise UsageError(
                    f"the job of {ref} has {key}={ours.get(key)!r} and the control's {theirs['config'].get(key)!r}; "
                    "train both alike, or the difference passes for a defence"
                )
