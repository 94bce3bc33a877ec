"""Keeps the libraries' chatter off the screen; what matters is raised or shown by tunevax."""

from __future__ import annotations

import logging
import os
import sys
import warnings

SETTINGS = {
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}
"""Of the libraries that read the environment when they are imported; what is set there already stays."""

CHATTERS = ("transformers", "datasets", "huggingface_hub", "accelerate", "peft", "bitsandbytes", "torch", "lm_eval")
"""Loggers of libraries; some bring a handler of their own, or set their level when they are imported."""

KERNELS = "bitsandbytes.backends.cpu.ops"
"""Warns that a package for faster 4-bit matrices on a CPU is not there, whoever imports transformers or PEFT."""


def hush_kernels() -> None:
    """Silence that one warning, which comes with most modules of tunevax. Run when tunevax is imported, so that a
    script which imports one of them does not print it either. Everything else is a script's own to silence."""
    logging.getLogger(KERNELS).setLevel(logging.ERROR)


def quiet() -> None:
    """Silence warnings, info logs and download bars of transformers and its friends in this process."""
    hush()

    import transformers

    transformers.utils.logging.disable_progress_bar()


def hush() -> None:
    """The part of it that imports nothing, for what libraries say while they are imported."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    if not sys.warnoptions:  # no -W and no PYTHONWARNINGS: nobody asked for them
        warnings.simplefilter("ignore")
    if logging.lastResort is not None:  # it prints the warnings of every logger that nobody gave a handler
        logging.lastResort.setLevel(logging.ERROR)
    for name in CHATTERS:
        logging.getLogger(name).setLevel(logging.ERROR)
