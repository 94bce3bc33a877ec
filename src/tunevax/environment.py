"""The processes of a run, the versions of libraries and the machine."""

from __future__ import annotations

import os
import platform
import sys
from typing import TypedDict

from tunevax import __version__
from tunevax.errors import UsageError


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


def host_memory() -> int:
    """The memory of the machine in bytes, 0 if it is unknown."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0


def versions() -> dict[str, str]:
    """Versions of tunevax, Python and the libraries that numbers depend on."""
    from importlib.metadata import version

    libraries = ("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "numpy")
    return {"tunevax": __version__, "python": platform.python_version(), **{n: version(n) for n in libraries}}


def hardware() -> HardwareRecord:
    """Processor, cores, memory and accelerator."""
    import torch

    memory = host_memory()
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
