"""tunevax hardens open-weight language models against harmful fine-tuning, and measures how much it helped."""

from tunevax.quiet import hush_kernels

hush_kernels()

__version__ = "0.1.0"
