"""Silences warnings and logs of libraries; tunevax raises or shows what matters."""

from __future__ import annotations

import logging
import os
import sys
import warnings

SETTINGS = {
    "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error", "DATASETS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCH_CPP_LOG_LEVEL": "ERROR", "TQDM_DISABLE": "1",
}  # fmt: skip
"""Environment variables that libraries read when they are imported; variables that are set already stay."""
CHATTERS = ("transformers", "datasets", "huggingface_hub", "accelerate", "peft", "bitsandbytes", "torch", "lm_eval")
"""Loggers of libraries; some have a handler of their own, or set their level when they are imported."""
KERNELS = "bitsandbytes.backends.cpu.ops"
"""Warns of a missing package for faster 4-bit matrices on a CPU whenever transformers or PEFT is imported."""


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
