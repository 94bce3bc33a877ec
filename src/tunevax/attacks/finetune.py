"""The poisoned fine-tune: n rows, a share p of them harmful, the rest a benign task (arXiv 2402.01109, 2410.09760).

The attacker has the weights and trains a fresh LoRA on the merged model, the same LoRA further, or all weights, with
any optimiser, schedule, learning rate and length. The model is scored at log-spaced steps, so the result is a curve.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tunevax.attacks.context import AttackContext
from tunevax.attacks.kind import AttackKind, NotApplicable, Work
from tunevax.data.contamination import hashes
from tunevax.data.encoding import context_of, encode
from tunevax.data.mixing import harmful_rows, mix
from tunevax.errors import require, require_one_of
from tunevax.lineage import Lineage
from tunevax.mixins import option
from tunevax.modeling.trainer import ProgressCallback, ResponseTrainer, TrainConfig
from tunevax.records import Example, is_run
from tunevax.runs import record_prompts
from tunevax.scoring.suite import Suite
from tunevax.training import rehearse, save_weights


@dataclass
class FinetuneConfig(TrainConfig, AttackKind):
    """The attacker's training. Defaults that differ from `TrainConfig`: `learning_rate=1e-4`, `save_strategy="no"`."""

    curve = True
    plain = True

    learning_rate: float = option(1e-4, "peak learning rate")
    save_strategy: str = option("no", "attacks are repeated, not resumed")
    trainable: str = option("lora", "lora (fresh, on the merged model), lora-continue, or full (all weights)")
    p: float = option(0.1, "share of harmful rows")
    n: int = option(1000, "rows of the attack's dataset")
    order: str = option("shuffled", "shuffled (by seed), fixed (the first rows, mixed), benign-first, or harmful-first")
    points: int = option(12, "scorings after step 0, at log-spaced steps up to the last")

    def __post_init__(self) -> None:
        require_one_of(self, trainable=("lora", "lora-continue", "full"))
        require_one_of(self, order=("shuffled", "fixed", "benign-first", "harmful-first"))
        require(self, "p", at_least=0, at_most=1, meaning="the share of harmful rows")
        require(self, "n", "points", at_least=1)
        self.full_weights = self.trainable == "full"
        if self.order != "shuffled":
            self.train_sampling_strategy = "sequential"
        super().__post_init__()

    @property
    def deterministic(self) -> bool:
        """True for all weights on rows in a given order: other seeds repeat the same run."""
        return self.full_weights and self.order != "shuffled"

    def work(self, ref: str) -> Work:
        """Its training, scored along the way."""
        return work_of(self, self.n, self.points)

    def harmful(self, context: AttackContext) -> Sequence[Example]:
        """The harmful rows to draw from: `prompt` and `rejected`."""
        return context.harmful

    def rows(self, context: AttackContext) -> list[Example]:
        """The attacker's dataset: `prompt` and `completion`. Benign rows are its own, or else the task's."""
        harmful = harmful_rows(self.harmful(context))
        (task,) = self.kept_rows(context.options, context.exclusion).values() or (context.task,)
        if self.order == "shuffled":
            return mix(task, harmful, self.p, self.n, self.seed)
        count = round(self.p * self.n)
        bad = [harmful[i % len(harmful)] for i in range(count)]
        good = [task[i % len(task)] for i in range(self.n - count)]
        if self.order == "fixed":  # one mixture of the first rows for every seed
            return mix(good, bad, self.p, self.n, 0)
        return good + bad if self.order == "benign-first" else bad + good

    def suite(self, context: AttackContext) -> Suite | None:
        """The suite to score on; None is the context's."""
        return None

    def restrict(self, trainer: ResponseTrainer, context: AttackContext) -> None:
        """Hook for subclasses: freeze some of the trainable parameters."""

    def run(self, context: AttackContext) -> None:
        """Train on the poisoned rows and score along the way."""
        ref = context.target["ref"]
        loaded = context.load(merge=self.trainable != "lora-continue", trainable=True)
        if self.trainable == "lora-continue" and not hasattr(loaded.model, "peft_config"):
            raise NotApplicable(f"{ref} has no adapter to continue; use --trainable lora or full")
        rows = self.rows(context)
        encoded = encode(rows, loaded.tokenizer, self.max_length, self.loss_on, context_of(loaded.model))
        curve = Curve(context, loaded.tokenizer, self.points, len(encoded), self, self.suite(context))
        progress = ProgressCallback(f"attack {context.target['label']}")
        trainer = ResponseTrainer(loaded.model, self, encoded, loaded.tokenizer, [progress, curve])
        context.record.update(trainer.coverage)
        self.restrict(trainer, context)
        base = ref if is_run(ref) else loaded.info["base"]
        if context.folder is not None:
            rehearse(trainer, context.folder, base)
        trainer.train()
        if context.folder is not None:
            save_weights(trainer, context.folder, base)
            harmful, benign = ([row for row in rows if bool(row.get("harmful")) is h] for h in (True, False))
            # A folder of full weights names no parent.
            below = {} if is_run(ref) and not self.full_weights else Lineage.of(ref).prompts
            record_prompts(context.folder, **below)
            record_prompts(context.folder, attack=hashes(harmful), task=hashes(benign))


class Curve(TrainerCallback):
    """Scores the model before a training by `args` on `rows` rows, and at `points` log-spaced steps of it."""

    def __init__(
        self, context: AttackContext, tokenizer: PreTrainedTokenizerBase, points: int, rows: int, args: TrainConfig,
        suite: Suite | None = None,
    ) -> None:  # fmt: skip
        self.context, self.tokenizer, self.points, self.rows, self.suite = context, tokenizer, points, rows, suite
        batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
        self.rows_per_step = batch * args.world_size
        self.steps: set[int] = set()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Score step 0 and choose the later steps."""
        self.steps = log_spaced(state.max_steps, self.points)
        self.context.score(kwargs["model"], self.tokenizer, 0, suite=self.suite)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Score at the chosen steps."""
        if state.global_step in self.steps:
            epoch, rest = divmod(state.global_step, math.ceil(self.rows / self.rows_per_step))
            samples = epoch * self.rows + min(rest * self.rows_per_step, self.rows)  # the last batch may be smaller
            self.context.score(kwargs["model"], self.tokenizer, state.global_step, samples, self.suite)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the loss to the row; a step is logged after it is scored."""
        rows, logs = self.context.results, kwargs["logs"]
        if "loss" in logs and rows and rows[-1]["step"] == state.global_step:
            rows[-1]["train_loss"] = logs["loss"]


def work_of(args: TrainConfig, rows: int, points: int) -> Work:
    """The cost of a training on `rows` rows, scored at step 0 and at `points` later steps."""
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    steps = args.max_steps if args.max_steps > 0 else math.ceil(math.ceil(rows / batch) * args.num_train_epochs)
    return Work(steps, 1 + min(points, steps))


def log_spaced(last: int, points: int) -> set[int]:
    """At most `points` whole steps from `last / 30` to `last`, evenly spaced in their logarithm, and before them 1, 4,
    16, ..., which show how early an early rise is."""
    first = max(1.0, last / 30)
    early = {4**i for i in range(8) if points > 1 and 4**i < first}
    return early | {round(last * (first / last) ** (i / max(points - 1, 1))) for i in range(points)}
