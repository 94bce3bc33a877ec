"""The progress bar and the log of a training run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from tunevax.console import bar

if TYPE_CHECKING:
    from transformers import TrainerState


class ProgressCallback(TrainerCallback):
    """Shows step, time left and loss of a training run."""

    def __init__(self, description: str) -> None:
        self.description, self.progress = description, bar()

    def on_train_begin(self, args: object, state: TrainerState, control: object, **_: object) -> None:
        """Start the bar at the step a resumed run is at."""
        if state.is_world_process_zero:
            if state.global_step:
                print(f"{self.description} resumes at step {state.global_step} of {state.max_steps}", file=sys.stderr)
            self.progress.start()
            now = state.global_step
            self.task = self.progress.add_task(
                self.description, total=state.max_steps, completed=now, note="", unit="step", begun=now
            )

    def on_step_end(self, args: object, state: TrainerState, control: object, **_: object) -> None:
        """Advance the bar."""
        if state.is_world_process_zero:
            self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args: object, state: TrainerState, control: object, logs: dict | None = None, **_: object) -> None:
        """Show the last loss."""
        if state.is_world_process_zero and logs and "loss" in logs:
            self.progress.update(self.task, note=f"loss {logs['loss']:.3f}")

    def on_train_end(self, args: object, state: TrainerState, control: object, **_: object) -> None:
        """Remove the bar."""
        self.progress.stop()


class LogCallback(TrainerCallback):
    """Writes the log lines that have a loss to a JSONL file as they come, so that a killed run has them.

    A resumed run begins with the lines up to its checkpoint: no step is there twice.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_begin(self, args: object, state: TrainerState, control: object, **_: object) -> None:
        """Begin with what the checkpoint knows."""
        if state.is_world_process_zero:
            part = self.file.with_name(self.file.name + ".part")
            part.write_text("".join(_logged(line) for line in state.log_history), encoding="utf-8")
            part.replace(self.file)

    def on_log(self, args: object, state: TrainerState, control: object, **_: object) -> None:
        """Add the newest line."""
        if state.is_world_process_zero:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(_logged(state.log_history[-1]))


def _logged(line: dict[str, Any]) -> str:
    return json.dumps(line) + "\n" if "loss" in line else ""
