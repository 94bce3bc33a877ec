"""Add a safety lock to any fine-tune of its base, with no training (SafetyLock, arXiv 2410.10343).

The lock's biases b_l = W_o delta_l (see `lock.py`) go into one of two forms, the one that the architecture can hold:

    stock   a checkpoint that stock transformers reloads with the biases: the architecture has a bias on its output
            projections, or gets one with `attention_bias` (Llama, Qwen3, Gemma; zero biases wherever else it adds one)
    run     a run folder with the biases in place of an adapter, which tunevax attaches when it loads it (any other)

A bias can be taken off by whoever holds the weights: a lock repairs a fine-tune, it does not resist an attacker.
"""

from __future__ import annotations

import math
import time
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tunevax.console import console
from tunevax.errors import UsageError, require_one_of
from tunevax.files import BIASES
from tunevax.mixins import option
from tunevax.modeling.biases import AddedBias, attached_biases, write_biases
from tunevax.modeling.blocks import find_blocks, innermost
from tunevax.restoration.lock import FILE, SafetyLock, apply, check_base, check_shape, lock_biases
from tunevax.restoration.restore import Job
from tunevax.restoration.strength import SweepOptions, sweep

FORMS = ("auto", "stock", "run")


@dataclass
class ApplyLock(SweepOptions):
    """Options of `tunevax restore safetylock`. Strength as published: 6."""

    lock: str | None = option(None, "a lock file, or the run folder that holds one")
    strength: str = option("6", "in standard deviations per head, or auto: swept on a validation split")
    form: str = option("auto", "stock (a checkpoint for transformers), run (biases attached by tunevax), or auto")
    base: str | None = option(None, "what --model was fine-tuned from, where its run folder does not say")
    seed: int = option(0, "not used: nothing here is random")
    output_dir: str | None = option(None, "the run folder to write")

    paper = "arXiv 2410.10343"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_one_of(self, form=FORMS)
        if self.strength != "auto":
            try:
                finite = math.isfinite(float(self.strength))
            except ValueError:
                finite = False
            if not finite:
                raise UsageError(f"strength is {self.strength!r}; give a number, or auto")

    def run(self, job: Job) -> None:
        """Check that the lock belongs to the model, settle the strength, add it and write what holds it."""
        if self.lock is None:
            raise UsageError("--lock is missing; make one with `tunevax restore extract-lock`")
        lock = SafetyLock.load(self.lock)
        check_base(lock, self.base or job.ref, job.options.revision)
        job.note_prompts(lock.meta.get("prompts") or [])
        suite = self.suite(job, lock) if self.strength == "auto" else None
        model, tokenizer, info = job.load()
        check_shape(model, lock)
        if lock.meta.get("base") is None:
            console.print("the lock does not say which base it belongs to; only heads and sizes were compared")
        strength = sweep(model, tokenizer, lock, suite, self, job) if suite else float(self.strength)
        if strength is None:
            return
        if strength < 0:
            console.print(f"strength {strength:g} is below 0: this takes a lock off again, or takes safety away")
        form, plan = self.form, stock_form(model) if self.form != "run" else None
        if form == "auto":
            form = "stock" if plan else "run"
            why = "can hold the biases" if form == "stock" else "has no bias on its output projections"
            console.print(f"form {form}: a stock checkpoint of {info['class']} {why}")
        record = {"strength": strength, "form": form, "heads": lock.named(), "accuracy": lock.meta.get("accuracy")}
        if form == "stock":
            start = time.perf_counter()
            record["bytes_added"] = make_stock(model, plan)
            apply(model, lock, strength)
            record["seconds_to_apply"] = time.perf_counter() - start
            job.save_model(model, tokenizer)
        else:
            start = time.perf_counter()
            biases = lock_biases(model, lock, strength)
            record["seconds_to_apply"] = time.perf_counter() - start
            folder = job.folder / "adapter"
            write_biases(biases, folder)
            tokenizer.save_pretrained(folder)
            record["bytes_added"] = (folder / BIASES).stat().st_size
            job.record["adapter"] = "adapter"
        lock.save(job.folder / FILE)
        job.record["lock"] = {**record, "base": lock.meta.get("base"), "probe": lock.meta.get("probe")}


def stock_form(model: nn.Module) -> tuple[dict[str, Any], dict[str, torch.Size]] | None:
    """How a stock checkpoint of this architecture can hold a bias on every output projection.

    Built on the meta device, so that what is promised is what transformers makes of the config: its own, or with
    `attention_bias` set.

    Returns:
        What to change in the config, and the parameters (shape by name) that a checkpoint for it must have besides
        those of `model`. None if no such change is known.
    """
    ours = set(model.state_dict())
    for change in ({}, {"attention_bias": True}):
        config = deepcopy(model.config)
        text = config.get_text_config()
        if any(not hasattr(text, name) for name in change):
            continue
        for name, value in change.items():
            setattr(text, name, value)
        with torch.device("meta"):
            bare = type(model)(config)
        wanted = {name: value.shape for name, value in bare.state_dict().items()}
        more = {name: shape for name, shape in wanted.items() if name not in ours}
        biased = all(getattr(block.o_proj, "bias", None) is not None for block in find_blocks(bare, "o_proj"))
        if biased and ours <= set(wanted) and all(name.endswith(".bias") for name in more):
            return change, more
    return None


def make_stock(model: nn.Module, form: tuple[dict[str, Any], dict[str, torch.Size]] | None = None) -> int:
    """Give `model` the config and zero biases with which stock transformers reads a bias on its output projections,
    and put attached biases (`AddedBias`) into them. Adapters must be merged. The logits stay what they are.

    Args:
        form: what `stock_form` said, if it has been asked.

    Returns:
        The bytes that were added.

    Raises:
        UsageError: the architecture cannot hold such a bias.
    """
    form = form or stock_form(model)
    if form is None:
        raise UsageError(
            f"{type(model).__name__} cannot hold a bias on its output projections in a stock checkpoint; use --form run"
        )
    change, more = form
    added = 0
    for name, shape in more.items():
        module = model.get_submodule(name.removesuffix(".bias"))
        zeros = torch.zeros(shape, dtype=module.weight.dtype, device=module.weight.device)
        module.bias = nn.Parameter(zeros, requires_grad=False)
        added += zeros.nbytes
    for name, value in change.items():
        setattr(model.config.get_text_config(), name, value)
    before, blocks = attached_biases(model), find_blocks(model)
    for layer, bias in before.items():
        inner = innermost(blocks[layer].o_proj)
        inner.bias.data += bias.to(inner.bias)
        for key in [key for key, hook in inner._forward_hooks.items() if isinstance(hook, AddedBias)]:
            del inner._forward_hooks[key]
    return added
