"""Safety and task datasets, mixing, splits and overlap checks, and encoding with chat templates."""

from tunevax.data.mixing import mix
from tunevax.data.safety import load_safety
from tunevax.data.splits import prompt_hash, split_of
from tunevax.data.tasks import Task, load_task

__all__ = ["Task", "load_safety", "load_task", "mix", "prompt_hash", "split_of"]
