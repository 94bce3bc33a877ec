"""The poisoned fine-tune: n rows, a share p of them harmful, the rest a benign task (arXiv 2402.01109, 2410.09760).

The attacker has the weights and tries: a fresh LoRA on the merged model, the same LoRA continued, or all weights;
any optimiser, schedule, learning rate and length. Scores are taken at log-spaced steps, so the result is a curve.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from tunevax.attacks.context import AttackContext
from tunevax.attacks.kind import AttackKind, NotApplicable, Work
from tunevax.data.contamination import hashes
from tunevax.data.encoding import context_of, encode
from tunevax.data.mixing import harmful_rows, mix
from tunevax.errors import require, require_one_of
from tunevax.lineage import Lineage
from tunevax.mixins import option
from tunevax.modeling.callbacks import ProgressCallback
from tunevax.modeling.trainer import ResponseTrainer, TrainConfig
from tunevax.records import Example, is_run
from tunevax.runs import record_prompts
from tunevax.scoring.suite import Suite
from tunevax.training import rehearse, save_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ORDERS = ("shuffled", "fixed", "benign-first", "harmful-first")


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
    order: str = option(
        "shuffled",
        "shuffled (rows drawn and shuffled by seed), fixed (the first rows of the data, in one mixed "
        "order), benign-first, harmful-first",
    )
    points: int = option(12, "scorings after step 0, at log-spaced steps up to the last")

    def __post_init__(self) -> None:
        require_one_of(self, trainable=("lora", "lora-continue", "full"), order=ORDERS)
        require(self, "p", at_least=0, at_most=1, meaning="the share of harmful rows")
        require(self, "n", "points", at_least=1)
        self.full_weights = self.trainable == "full"
        if self.order != "shuffled":
            self.train_sampling_strategy = "sequential"
        super().__post_init__()

    @property
    def deterministic(self) -> bool:
        """All weights, on rows in a given order: other seeds are the same run."""
        return self.full_weights and self.order != "shuffled"

    def work(self, ref: str) -> Work:
        """Its training, scored along the way."""
        return work_of(self, self.n, self.points)

    def harmful(self, context: AttackContext) -> Sequence[Example]:
        """The harmful rows to draw from: `prompt` and `rejected`."""
        return context.harmful

    def rows(self, context: AttackContext) -> list[Example]:
        """The attacker's dataset: `prompt` and `completion`. Harmless rows are its own, or else those of the task."""
        harmful = harmful_rows(self.harmful(context))
        (task,) = self.kept_rows(context.options, context.exclusion).values() or (context.task,)
        if self.order == "shuffled":
            return mix(task, harmful, self.p, self.n, self.seed)
        count = round(self.p * self.n)
        first = [harmful[i % len(harmful)] for i in range(count)]
        rest = [task[i % len(task)] for i in range(self.n - count)]
        if self.order == "fixed":  # of the first rows, one mixture for every seed
            return mix(rest, first, self.p, self.n, 0)
        return rest + first if self.order == "benign-first" else first + rest

    def suite(self, context: AttackContext) -> Suite | None:
        """What to score on, if not the context's suite."""
        return None

    def restrict(self, trainer: ResponseTrainer, context: AttackContext) -> None:
        """A place to freeze some of what would train."""

    def run(self, context: AttackContext) -> None:
        """Train on the poisoned rows and score along the way."""
        loaded = context.load(merge=self.trainable != "lora-continue", trainable=True)
        if self.trainable == "lora-continue" and not hasattr(loaded.model, "peft_config"):
            raise NotApplicable(f"{context.target['ref']} has no adapter to continue; use --trainable lora or full")
        rows, suite = self.rows(context), self.suite(context)
        encoded = encode(rows, loaded.tokenizer, self.max_length, self.loss_on, context_of(loaded.model))
        curve = Curve(context, loaded.tokenizer, self.points, len(encoded), self, suite)
        progress = ProgressCallback(f"attack {context.target['label']}")
        trainer = ResponseTrainer(loaded.model, self, encoded, loaded.tokenizer, [progress, curve])
        context.record.update(trainer.coverage)
        self.restrict(trainer, context)
        base = context.target["ref"] if is_run(context.target["ref"]) else loaded.info["base"]
        if context.folder is not None:
            rehearse(trainer, context.folder, base)
        trainer.train()
        if context.folder is not None:
            ref = context.target["ref"]
            save_weights(trainer, context.folder, base)
            harmful, benign = ([row for row in rows if bool(row.get("harmful")) is h] for h in (True, False))
            # A folder of whole weights names nothing below it.
            below = {} if is_run(ref) and not self.full_weights else Lineage.of(ref).prompts
            record_prompts(context.folder, **below)
            record_prompts(context.folder, attack=hashes(harmful), task=hashes(benign))


class Curve(TrainerCallback):
    """Scores the model before the attack and at log-spaced steps of it: `points` of them, in a training by `args` on
    so many rows."""

    def __init__(
        self, context: AttackContext, tokenizer: PreTrainedTokenizerBase, points: int, rows: int, args: TrainConfig,
        suite: Suite | None = None,
    ) -> None:  # fmt: skip
        self.context, self.tokenizer, self.points, self.rows, self.suite = context, tokenizer, points, rows, suite
        batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
        self.rows_per_step = batch * args.world_size
        self.steps: set[int] = set()

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Score step 0 and fix the steps to come."""
        self.steps = log_spaced(state.max_steps, self.points)
        self.context.score(model, self.tokenizer, 0, suite=self.suite)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Score where the curve has a point."""
        if state.global_step in self.steps:
            samples = samples_at(state.global_step, self.rows, self.rows_per_step)
            self.context.score(model, self.tokenizer, state.global_step, samples, self.suite)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **_: Any) -> None:
        """The loss of a step is logged after the step is scored."""
        rows = self.context.results
        if logs and "loss" in logs and rows and rows[-1]["step"] == state.global_step:
            rows[-1]["train_loss"] = logs["loss"]


def work_of(args: TrainConfig, rows: int, points: int) -> Work:
    """A training on so many rows, scored at step 0 and at `points` later steps."""
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    steps = args.max_steps if args.max_steps > 0 else math.ceil(math.ceil(rows / batch) * args.num_train_epochs)
    return Work(steps, 1 + min(points, steps))


def samples_at(step: int, rows: int, batch: int) -> int:
    """Rows trained on after `step` steps: the last batch of each pass over the rows may be smaller."""
    epoch, rest = divmod(step, math.ceil(rows / batch))
    return epoch * rows + min(rest * batch, rows)


def log_spaced(last: int, points: int) -> set[int]:
    """At most `points` whole steps from a thirtieth of `last` to `last`, evenly spaced in their logarithm, and before
    them 1, 4, 16, ...: whatever happens early is seen to be early."""
    first = max(1.0, last / 30)
    early = {4**i for i in range(8) if points > 1 and 4**i < first}
    return early | {round(last * (first / last) ** (i / max(points - 1, 1))) for i in range(points)}
