"""`tunevax audit --dry-run`: the cells, with time and memory estimated from a few steps of the control."""

from __future__ import annotations

import itertools
import tempfile
import time
from typing import Any, cast

from transformers import TrainerCallback

from tunevax.attacks.finetune import FinetuneConfig
from tunevax.attacks.kind import NotApplicable
from tunevax.audit.plan import AuditCell, AuditPlan, cells_of
from tunevax.audit.protocol import Setting, build
from tunevax.audit.workers import Worker, count_workers
from tunevax.console import as_bytes, as_time
from tunevax.data.encoding import context_of, encode
from tunevax.environment import peak_memory
from tunevax.modeling.trainer import ResponseTrainer
from tunevax.scoring.evaluate import evaluate

STEPS = 4  # of which the first is warm-up
SHAPE = ("trainable", "per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "lora_r", "bf16")
"""The options that a step's cost depends on."""


def show(plan: AuditPlan) -> None:
    """Print every cell with its estimated seconds, then the sum and the peak memory."""
    cells = cells_of(plan, plan.grid, True, plan.protocol.screen == 0)
    clock, total = Clock(plan), 0.0
    for i, cell in enumerate(cells, 1):
        total += (seconds := clock.seconds(cell))
        print(f"[{i}/{len(cells)}] {cell.summary} · about {as_time(seconds)}")
    if plan.protocol.screen:
        seeds = len(plan.protocol.seeds) - 1
        ranked = [c for c in cells if c.key.get("traits", {}).get("plain")]
        mean = sum(clock.seconds(c) for c in ranked) / max(len(ranked), 1)
        # Each model has its own strongest settings, which attack all models.
        most = plan.protocol.screen * len(plan.targets) ** 2 * seeds
        total += mean * most
        print(f"then at most {most} cells: the {plan.protocol.screen} strongest of each model with {seeds} more seeds")
    for skipped in plan.skipped:
        print(f"will be skipped: {skipped['attack']}, for {skipped['why']}")
    workers = count_workers(plan.options.workers, str(plan.options.control))
    print(
        f"{len(cells)} cells, about {as_time(total / workers)} with {workers} worker{'s' * (workers > 1)}, each with a "
        f"peak of about {as_bytes(peak_memory())} (measured here, on {STEPS} steps of each shape of training)"
    )


class Clock:
    """Seconds per step and per scoring, measured once for each shape of training."""

    def __init__(self, plan: AuditPlan) -> None:
        self.target, self.worker = plan.targets[0], Worker(plan.options, plan.exclusion, plan.suite)
        self.steps: dict[tuple, float] = {}  # seconds per step by shape of training
        context = self.worker.context(AuditCell(self.target, None, {"seed": 0}, ""), "", None)
        times = [time.monotonic()]
        loaded = context.load()
        times.append(time.monotonic())
        for full in (False, False, True):  # the first is warm-up
            evaluate(loaded.model, loaded.tokenizer, self.worker.suite, full=full)
            times.append(time.monotonic())
        self.load, _, self.suite, self.full = (after - before for before, after in itertools.pairwise(times))

    def seconds(self, cell: AuditCell) -> float:
        """The estimate for one cell."""
        if cell.setting is None:
            return self.load + self.full
        config = build(cell.setting.kind, cell.setting.values, cell.key["seed"], None)
        try:
            work = config.work(cell.target["ref"])
        except NotApplicable:
            return 0.0
        seconds = work.step_seconds
        if work.steps and seconds is None:
            shape = tuple(sorted((k, v) for k, v in cell.setting.values.items() if k in SHAPE))
            if shape not in self.steps:
                self.steps[shape] = self.measure(dict(shape))
            seconds = self.steps[shape]
        return self.load + work.scorings * self.suite + work.steps * (seconds or 0.0)

    def measure(self, shape: dict[str, Any]) -> float:
        """Seconds of one training step of this shape: trains the control for a few steps."""
        trainable = "full" if shape.get("trainable") == "full" else "lora"
        values = {**shape, "p": 1.0, "max_steps": STEPS, "trainable": trainable}
        marks = Marks()
        with tempfile.TemporaryDirectory() as scratch:
            config = cast(FinetuneConfig, build("finetune", values, 0, scratch))
            cell = AuditCell(self.target, Setting("finetune", "", values, {}, (0,)), {"seed": 0}, "")
            context = self.worker.context(cell, scratch, None)
            loaded = context.load(trainable=True)
            rows = config.rows(context)
            encoded = encode(rows, loaded.tokenizer, config.max_length, context=context_of(loaded.model))
            ResponseTrainer(loaded.model, config, encoded, loaded.tokenizer, [marks]).train()
        return (marks.times[-1] - marks.times[0]) / (len(marks.times) - 1)


class Marks(TrainerCallback):
    """When each step ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *_: object, **__: object) -> None:
        """Note the time."""
        self.times.append(time.monotonic())
