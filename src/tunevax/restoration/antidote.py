"""Antidote (arXiv 2408.09600): prune the weights of a fine-tune that answer harmful prompts, without training.

For each linear layer with an adapter dW = s B A, with X the layer's inputs at the tokens of harmful answers:

    S_ij = |dW_ij| ||X_j||                                   (Wanda score, arXiv 2306.11695; X_j is feature j)
    M    = 1 at the ceil(alpha in) largest scores of each row of dW, else 0
    W    = W_before + dW * (1 - M)

Only the update is pruned: alpha = 1 gives the model before the fine-tune and alpha = 0 the fine-tune.

    effective  as above. The pruned dW no longer has rank r, so the run holds a whole merged model.
    official   as published: A is pruned with the layer's inputs and B with A X; the result is an adapter. This differs:
               an entry of A is shared by all outputs, and a row of B has only r entries, of which ceil prunes 1 in 8
               for alpha = 0.05 and 0.1 alike.

Deviations from the published code: it includes the inputs at prompt and padding, and takes those of a block after the
blocks below it were pruned; here they are those of the fine-tune at answer tokens, from one pass.

Cost: one forward pass over `n` rows. Memory: the model, one sum of squares per input of each adapted layer, and one dW.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import torch
from peft import PeftModel
from peft.tuners.lora import Linear
from transformers import PreTrainedModel

from tunevax.console import bar
from tunevax.data.encoding import context_of, encode
from tunevax.errors import UsageError, require, require_one_of
from tunevax.lineage import Lineage
from tunevax.mixins import option
from tunevax.modeling.adapters import KEPT, active, factors, lora_layers, untie
from tunevax.modeling.batches import collated
from tunevax.modeling.blocks import unwrap
from tunevax.modeling.hooks import attached
from tunevax.modeling.loss import last_hidden
from tunevax.modeling.precision import wide
from tunevax.restoration.restore import Job

Rows = Sequence[dict[str, list[int]]]
Key = str | tuple[str, str]
"""A layer, or a layer and "B" for that factor of its adapter."""


@dataclass
class Antidote:
    """Options of `tunevax restore antidote`; `--model` is a run or an adapter folder. Defaults as published: alpha 0.1
    (0.05 for its tasks GSM8K and AG News), 2000 harmful rows."""

    output_dir: str | None = option(None, "the run folder to write")
    seed: int = option(42, "of the rows drawn")
    alpha: float = option(0.1, "share of each row of the update that is pruned")
    form: str = option("effective", "effective (prune dW, save a merged model), or official (prune A and B)")
    n: int = option(2000, "harmful rows to score on, at most")
    max_length: int = option(512, "tokens per row; longer answers are cut")
    batch_size: int = option(16, "rows run together")
    paper: ClassVar[str] = "arXiv 2408.09600"

    def __post_init__(self) -> None:
        require(self, "alpha", at_least=0, at_most=1, meaning="the share that is pruned")
        require(self, "n", "batch_size", at_least=1)
        require_one_of(self, form=("effective", "official"))

    def run(self, job: Job) -> None:
        """Score, prune and write; the record gets a row per layer under `layers`."""
        rows = job.pairs(("rejected",))
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.seed))[: self.n].tolist()
        loaded = job.load(merge=False)
        lora_layers(loaded.model, job.ref)  # raises before the forward passes
        tokenizer, context = loaded.tokenizer, context_of(unwrap(loaded.model))
        drawn = [rows[i] for i in sorted(order)]
        encoded = encode(drawn, tokenizer, self.max_length, context=context, answer="rejected")
        model, table = antidote(loaded.model, encoded, tokenizer.pad_token_id, self.alpha, self.form, self.batch_size)
        job.record.update({"rows": len(encoded), "layers": table})
        if self.form == "effective":
            job.save_model(cast("PreTrainedModel", model), tokenizer)
        else:
            job.save_adapter(loaded.model, tokenizer, str(Lineage.of(job.ref).adapter_on))


@torch.no_grad()
def antidote(
    model: PeftModel, rows: Rows, pad_token_id: int, alpha: float = 0.1, form: str = "effective", batch_size: int = 16
) -> tuple[PreTrainedModel | PeftModel, list[dict[str, Any]]]:
    """Prune the adapter of `model`, plain LoRA on linear layers, in place.

    Args:
        rows: harmful rows as `input_ids` and `labels`, -100 at the prompt.
        alpha: share of each row that is pruned, rounded up to whole weights.
        form: `effective` returns the merged model without adapters, `official` the same `PeftModel`.

    Returns:
        The model; and a row per layer: `layer`, `pruned` (share of the weights: of dW, or of A and B together),
        `ratio` = ||dW after|| / ||dW before|| (Frobenius; None for an adapter that is zero).

    Raises:
        UsageError: no adapter, another kind of adapter, a layer whose inputs are not tokens, or (`effective`) a dtype
            that rounds the update away.
    """
    layers = lora_layers(model, "the model")
    modules: dict[Key, torch.nn.Module] = dict(layers.items())
    kept = total = 0.0
    if form == "effective":
        untie(model)  # the update of a head must not change the embedding
    else:
        modules |= {(name, "B"): layer.lora_B[active(layer)] for name, layer in layers.items()}
    sums = input_squares(model, modules, rows, pad_token_id, batch_size)
    table = []
    with bar() as progress:
        task = progress.add_task("antidote", total=len(layers), note="")
        for name, layer in layers.items():
            before = update(layer)
            if form == "effective":
                mask = salient(before, sums[name].sqrt(), alpha)
                after = before.masked_fill(mask, 0)
                weight = cast("torch.Tensor", layer.get_base_layer().weight).data
                wanted = after.T if layer.fan_in_fan_out else after
                was = wide(weight).clone()
                weight += wanted
                kept += float(((wide(weight) - was) * wanted).sum(dtype=torch.float64))
                total += float(wide(wanted).square().sum(dtype=torch.float64))
                factors(layer)[1].zero_()  # it is in the weight
                pruned = mask.float().mean()
            else:
                a, b = factors(layer)
                masks = [salient(a, sums[name].sqrt(), alpha), salient(b, sums[name, "B"].sqrt(), alpha)]
                for weight, mask in zip((a, b), masks, strict=True):
                    weight.masked_fill_(mask, 0)
                after, pruned = update(layer), torch.cat([m.flatten() for m in masks]).float().mean()
            size = wide(before).norm()
            ratio = float(wide(after).norm() / size) if size > 0 else None
            table.append({"layer": name, "pruned": float(pruned), "ratio": ratio})
            progress.advance(task)
    if kept < KEPT * total:
        raise UsageError(
            f"rounding to the model's dtype keeps {kept / total:.0%} of the pruned adapter; use --dtype float32"
        )
    return model.merge_and_unload() if form == "effective" else model, table


def update(layer: Linear) -> torch.Tensor:
    """dW = s B A of a layer, [out, in]."""
    weight = layer.get_delta_weight(active(layer))
    return weight.T if layer.fan_in_fan_out else weight


def salient(weight: torch.Tensor, norms: torch.Tensor, alpha: float) -> torch.Tensor:
    """The ceil(alpha in) largest scores of each row of `weight` [out, in], as a mask; `norms` [in] are the L2 norms of
    the inputs over the tokens."""
    count = math.ceil(round(alpha * weight.shape[1], 6))  # 0.1 * 30 is a little over 3
    top = (wide(weight).abs() * wide(norms)).topk(count, dim=1).indices
    return torch.zeros_like(weight, dtype=torch.bool).scatter_(1, top, True)


def input_squares(
    model: PeftModel, modules: Mapping[Key, torch.nn.Module], rows: Rows, pad_token_id: int, batch_size: int
) -> dict[Key, torch.Tensor]:
    """The sum of squares of each module's inputs over the answer tokens (labels other than -100) of all rows, [in] in
    fp64, by key."""
    sums: dict[Key, torch.Tensor] = {}
    answers = torch.empty(0)

    def add(key: Key, _module: torch.nn.Module, args: tuple) -> None:
        x = args[0]
        if x.shape[:-1].numel() != answers.numel():
            raise UsageError(f"{key} gets {list(x.shape[:-1])} inputs and not every token, so it cannot be scored")
        squares = x.reshape(-1, x.shape[-1])[answers.flatten()].double().square().sum(0)
        sums[key] = sums[key] + squares if key in sums else squares

    model.eval()
    with bar() as progress, attached([m.register_forward_pre_hook(partial(add, key)) for key, m in modules.items()]):
        task = progress.add_task("score", total=len(rows), note="")
        for part, batch in collated(rows, pad_token_id, batch_size, next(model.parameters()).device, False):
            answers = batch.pop("labels") != -100
            last_hidden(model, batch)
            progress.advance(task, len(part))
    return sums
