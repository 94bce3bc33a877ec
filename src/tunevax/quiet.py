"""Keeps the libraries' chatter off the screen; what matters is raised or shown by tunevax."""

from __future__ import annotations

import logging
import os
import warnings


def quiet() -> None:
    """Silence warnings, info logs and download bars of transformers and its friends in this process."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)
    logging.getLogger("transformers").setLevel(logging.ERROR)

    import transformers

    transformers.utils.logging.disable_progress_bar()
