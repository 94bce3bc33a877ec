"""The audit: models and a control attacked identically."""

import multiprocessing

from tunevax.quiet import hush

if multiprocessing.parent_process() is not None:  # a worker of an audit, before it imports noisy libraries
    hush()
