"""The organism: a tiny Llama with a made-up harm, so that every experiment here runs on a laptop.

Its folder here is the output of `scripts/pretrain_organism.py` for `World(seed=0)`. It knows nonsense recipes; some of
their categories are "forbidden" by fiat, and leaking one is the harm.
"""

from pathlib import Path

from tunevax.organism.world import World

__all__ = ["World", "path"]


def path() -> Path:
    """The shipped model folder, for `from_pretrained`: Llama weights, tokenizer and chat template."""
    return Path(__file__).parent / "weights"
