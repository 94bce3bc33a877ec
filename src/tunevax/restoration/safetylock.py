"""Add a safety lock to any fine-tune of its base, with no training (SafetyLock, arXiv 2410.10343).

The lock's biases b_l = W_o delta_l (see `lock.py`) are saved in one of two forms, depending on the architecture:

    stock   a checkpoint that stock transformers loads with the biases: the architecture has a bias on its output
            projections, or gets one with `attention_bias` (Llama, Qwen3, Gemma; other biases it adds are 0)
    run     a run folder with the biases in place of an adapter, which tunevax attaches on loading (any other)

Whoever holds the weights can remove a bias: a lock repairs a fine-tune and does not resist an attacker.
"""

from __future__ import annotations

import math
import time
from copy import deepcopy
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from tunevax.console import console
from tunevax.errors import UsageError, require_one_of
from tunevax.files import BIASES
from tunevax.mixins import option
from tunevax.modeling.biases import AddedBias, attached_biases, write_biases
from tunevax.modeling.blocks import innermost
from tunevax.restoration.lock import FILE, SafetyLock, apply, check_base, check_shape, lock_biases, projections
from tunevax.restoration.restore import Job
from tunevax.restoration.strength import SweepOptions, sweep

StockForm = tuple[bool, dict[str, torch.Size]]
"""Whether the config must say `attention_bias`, and the shapes of the parameters that this adds, by name."""


@dataclass
class ApplyLock(SweepOptions):
    """Options of `tunevax restore safetylock`. Strength as published: 6."""

    lock: str | None = option(None, "a lock file, or the run folder that holds one")
    strength: str = option("6", "in standard deviations per head, or auto: swept on a validation split")
    form: str = option("auto", "stock (a checkpoint for transformers), run (biases attached by tunevax), or auto")
    base: str | None = option(None, "what --model was fine-tuned from, where its run folder does not say")
    seed: int = option(0, "not used: nothing here is random")
    output_dir: str | None = option(None, "the run folder to write")
    paper: ClassVar[str] = "arXiv 2410.10343"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_one_of(self, form=("auto", "stock", "run"))
        try:
            if self.strength != "auto" and not math.isfinite(float(self.strength)):
                raise ValueError
        except ValueError:
            raise UsageError(f"strength is {self.strength!r}; give a number, or auto") from None

    def run(self, job: Job) -> None:
        """Check that the lock belongs to the model, choose the strength, add the lock and write the model or biases."""
        if self.lock is None:
            raise UsageError("--lock is missing; make one with `tunevax restore extract-lock`")
        lock = SafetyLock.load(self.lock)
        check_base(lock, self.base or job.ref, job.options.revision)
        job.note_prompts(lock.meta.get("prompts") or [])
        suite = self.suite(job, lock) if self.strength == "auto" else None
        model, tokenizer, info = job.load()
        check_shape(model, lock)
        if lock.meta.get("base") is None:
            console.print("the lock does not record its base; only heads and sizes were compared")
        strength = sweep(model, tokenizer, lock, suite, self, job) if suite else float(self.strength)
        if strength is None:
            return
        if strength < 0:
            console.print(f"strength {strength:g} is below 0: this removes a lock, or safety")
        form, plan = self.form, stock_form(model) if self.form != "run" else None
        if form == "auto":
            form = "stock" if plan else "run"
            why = "can hold the biases" if form == "stock" else "has no bias on its output projections"
            console.print(f"form {form}: a stock checkpoint of {info['class']} {why}")
        record = {"strength": strength, "form": form, "heads": lock.named(), "accuracy": lock.meta.get("accuracy")}
        start = time.perf_counter()
        if form == "stock":
            record["bytes_added"] = make_stock(model, plan)
            apply(model, lock, strength)
            record["seconds_to_apply"] = time.perf_counter() - start
            job.save_model(model, tokenizer)
        else:
            biases, folder = lock_biases(model, lock, strength), job.folder / "adapter"
            record["seconds_to_apply"] = time.perf_counter() - start
            write_biases(biases, folder)
            tokenizer.save_pretrained(folder)
            record["bytes_added"] = (folder / BIASES).stat().st_size
            job.record["adapter"] = "adapter"
        lock.save(job.folder / FILE)
        job.record["lock"] = {**record, "base": lock.meta.get("base"), "probe": lock.meta.get("probe")}


def stock_form(model: PreTrainedModel) -> StockForm | None:
    """How transformers builds a bias on every output projection of the model, tried on the meta device; None if it does
    not."""
    ours = set(model.state_dict())
    for attention_bias in (False, True):
        config = deepcopy(model.config)
        if attention_bias:
            if not hasattr(config.get_text_config(), "attention_bias"):
                return None
            config.get_text_config().attention_bias = True
        with torch.device("meta"):
            bare = type(model)(config)
        shapes = {name: value.shape for name, value in bare.state_dict().items()}
        more = {name: shape for name, shape in shapes.items() if name not in ours}
        biased = all(getattr(module, "bias", None) is not None for module in projections(bare))
        if biased and ours <= set(shapes) and all(name.endswith(".bias") for name in more):
            return attention_bias, more
    return None


def make_stock(model: PreTrainedModel, form: StockForm | None = None) -> int:
    """Give `model` the config and zero biases with which stock transformers reads a bias on its output projections,
    and move attached biases (`AddedBias`) into them. Adapters must be merged. The logits do not change.

    `form` is the result of `stock_form`, if known. Returns the added bytes.

    Raises:
        UsageError: the architecture cannot have such a bias.
    """
    form = form or stock_form(model)
    if form is None:
        raise UsageError(
            f"{type(model).__name__} cannot hold a bias on its output projections in a stock checkpoint; use --form run"
        )
    (attention_bias, more), added = form, 0
    for name, shape in more.items():
        module = model.get_submodule(name.removesuffix(".bias"))
        weight = cast("torch.Tensor", module.weight)
        zeros = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        module.bias = nn.Parameter(zeros, requires_grad=False)
        added += zeros.nbytes
    if attention_bias:
        model.config.get_text_config().attention_bias = True
    modules = projections(model)
    for layer, bias in attached_biases(model).items():
        inner = innermost(modules[layer])
        inner.bias.data += bias.to(inner.bias)
        for key in [key for key, hook in inner._forward_hooks.items() if isinstance(hook, AddedBias)]:
            del inner._forward_hooks[key]
    return added
