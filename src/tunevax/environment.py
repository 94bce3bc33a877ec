"""The process of a command, what libraries print in it, their versions, and the machine."""

from __future__ import annotations

import logging
import os
import platform
import sys
import warnings
from typing import TypedDict

from tunevax.errors import UsageError

SETTINGS = {
    "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error", "DATASETS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}  # fmt: skip
"""Environment variables that libraries read when they are imported; variables that are set already stay."""
CHATTERS = ("transformers", "datasets", "huggingface_hub", "accelerate", "peft", "bitsandbytes", "torch", "lm_eval")
"""Loggers of libraries; some have a handler of their own, or set their level when they are imported."""
KERNELS = "bitsandbytes.backends.cpu.ops"
"""Warns of a missing package for faster 4-bit matrices on a CPU whenever transformers or PEFT is imported."""


class HardwareRecord(TypedDict):
    """The machine, and the number of processes of the run."""

    cpu: str
    cores: int | None
    memory_gib: float
    gpu: str | None
    processes: int


def is_main_process() -> bool:
    """Whether this is the process that writes and prints, under a launcher or without one."""
    return os.environ.get("RANK", "0") == "0"


def require_one_process(what: str) -> None:
    """Raise a UsageError if `what` was started by a launcher with several processes."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(f"{what} runs in one process; start it without a launcher")


def versions() -> dict[str, str]:
    """Versions of tunevax, Python and the libraries that numbers depend on."""
    from importlib.metadata import version

    from tunevax import __version__

    libraries = ("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "numpy")
    return {"tunevax": __version__, "python": platform.python_version(), **{n: version(n) for n in libraries}}


def hardware() -> HardwareRecord:
    """Processor, cores, memory and accelerator."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": platform.machine(), "cores": os.cpu_count(), "memory_gib": round(memory / 2**30, 1), "gpu": gpu,
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
    }  # fmt: skip


def peak_memory() -> int:
    """Bytes: the device allocator's peak where there is an accelerator, else this process's largest resident size."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return 0
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024


def hush_kernels() -> None:
    """Silence the warning of `KERNELS`, which most modules of tunevax cause, whenever tunevax is imported."""
    logging.getLogger(KERNELS).setLevel(logging.ERROR)


def quiet() -> None:
    """Silence warnings, info logs and download bars of transformers and related libraries in this process."""
    hush()

    import transformers

    transformers.utils.logging.disable_progress_bar()


def hush() -> None:
    """The part of `quiet` that imports nothing, for messages of libraries during their import."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    if not sys.warnoptions:  # no -W and no PYTHONWARNINGS
        warnings.simplefilter("ignore")
    if logging.lastResort is not None:  # it prints the warnings of every logger without a handler
        logging.lastResort.setLevel(logging.ERROR)
    for name in CHATTERS:
        logging.getLogger(name).setLevel(logging.ERROR)
