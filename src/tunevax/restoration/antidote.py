"""Antidote (arXiv 2408.09600): prune the weights of a fine-tune that answer harmful prompts, without training.

For each linear layer with an adapter dW = s B A, with X the layer's inputs at the tokens of harmful answers:

    S_ij = |dW_ij| ||X_j||                                   (Wanda score, arXiv 2306.11695; X_j is feature j)
    M    = 1 at the ceil(alpha in) largest scores of each row of dW, else 0
    W    = W_before + dW * (1 - M)

Only what the fine-tune added is pruned, so alpha = 1 is the model before it and alpha = 0 the fine-tune.

    effective  as above. What is left of dW has no rank r any more, so the run holds a whole merged model.
    official   as published: A and B are pruned each by itself, A with the layer's inputs and B with A X. Stays an
               adapter. Not the same: an entry of A is shared by all outputs, and a row of B has only r entries, of
               which ceil takes 1 in 8 whether alpha is 0.05 or 0.1.

Deviations from the published code: it counts the inputs at prompt and padding too, and takes those of a block after
the blocks below it were pruned; here they are those of the fine-tune at answer tokens, from one pass.

Cost: one forward pass over `n` rows, no backward. Memory: the model, the running sums of squares, one number per input
of each adapted layer, and one dW; no activation is kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from tunevax.console import bar
from tunevax.data.encoding import context_of, encode
from tunevax.errors import UsageError, require, require_one_of
from tunevax.lineage import Lineage, absolute
from tunevax.mixins import option
from tunevax.modeling.adapters import KEPT, untie
from tunevax.modeling.batches import collated
from tunevax.modeling.blocks import unwrap
from tunevax.modeling.lora import active, factors, lora_layers
from tunevax.modeling.loss import last_hidden
from tunevax.modeling.precision import wide
from tunevax.restoration.restore import Job

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import Linear
    from transformers import PreTrainedModel

FORMS = ("effective", "official")


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
        require_one_of(self, form=FORMS)
        require(self, "n", "batch_size", at_least=1)

    def run(self, job: Job) -> None:
        """Score, prune and write; the record has a row per layer under `layers`."""
        rows = job.pairs(("rejected",))
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.seed))[: self.n].tolist()
        loaded = job.load(merge=False)
        lora_layers(loaded.model, job.ref)  # before the forward passes
        encoded = encode(
            [rows[i] for i in sorted(order)], loaded.tokenizer, self.max_length,
            context=context_of(unwrap(loaded.model)), answer="rejected",
        )  # fmt: skip
        model, table = antidote(
            loaded.model, encoded, loaded.tokenizer.pad_token_id, self.alpha, self.form, self.batch_size
        )
        job.record.update({"rows": len(encoded), "layers": table})
        if self.form == "effective":
            job.save_model(model, loaded.tokenizer)
        else:
            model.save_pretrained(job.folder / "adapter")
            loaded.tokenizer.save_pretrained(job.folder / "adapter")
            on = Lineage.of(job.ref).adapter_on
            job.record.update({"adapter": "adapter", "adapter_on": absolute(str(on))})


@torch.no_grad()
def antidote(
    model: PeftModel,
    rows: Sequence[dict[str, list[int]]],
    pad_token_id: int,
    alpha: float = 0.1,
    form: str = "effective",
    batch_size: int = 16,
) -> tuple[PreTrainedModel | PeftModel, list[dict[str, Any]]]:
    """Prune the adapter of `model`, a `PeftModel` with plain LoRA on linear layers, in place.

    Args:
        rows: harmful rows as `input_ids` and `labels`, -100 at the prompt.
        alpha: share of each row that is pruned, rounded up to whole weights; 0 changes nothing.
        form: `effective` gives back the merged model without adapters, `official` the same `PeftModel`.

    Returns:
        The model; and a row per layer: `layer`, `pruned` (share of the weights: of dW, or of A and B together),
        `ratio` = ||dW after|| / ||dW before|| (Frobenius; None for an adapter that was zero).

    Raises:
        UsageError: no adapter, another kind of adapter, a layer whose inputs are not tokens, or (`effective`) weights
            in a dtype that rounds the update away.
    """
    layers = lora_layers(model, "the model")
    modules: dict[Key, torch.nn.Module] = dict(layers.items())
    if form == "effective":
        untie(model)  # what is added to a head's weight must not reach the embedding
    kept = total = 0.0
    if form == "official":
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
                weight = layer.get_base_layer().weight.data
                wanted = after.T if layer.fan_in_fan_out else after
                was = wide(weight).clone()
                weight += wanted
                kept += float(((wide(weight) - was) * wanted).sum(dtype=torch.float64))
                total += float(wide(wanted).square().sum(dtype=torch.float64))
                factors(layer)[1].zero_()  # it is in the weight now
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
    """Where the largest scores of each row are, [out, in] bool: ceil(alpha in) of them.

    Args:
        weight: [out, in].
        norms: [in], L2 norm of each input over the tokens.
    """
    count = math.ceil(round(alpha * weight.shape[1], 6))  # 0.1 * 30 is a little over 3
    top = (wide(weight).abs() * wide(norms)).topk(count, dim=1).indices
    return torch.zeros_like(weight, dtype=torch.bool).scatter_(1, top, True)


def input_squares(
    model: PeftModel,
    modules: Mapping[Key, torch.nn.Module],
    rows: Sequence[dict[str, list[int]]],
    pad_token_id: int,
    batch_size: int,
) -> dict[Key, torch.Tensor]:
    """For each module, by key, the sum of squares of each of its inputs over the answer tokens (labels that are not
    -100) of all rows, [in] in fp64."""
    model.eval()
    with bar() as progress, listening(modules) as (sums, where):
        task = progress.add_task("score", total=len(rows), note="")
        for part, batch in collated(rows, pad_token_id, batch_size, next(model.parameters()).device, False):
            where[:] = [batch.pop("labels") != -100]
            last_hidden(model, batch)
            progress.advance(task, len(part))
    return sums


@contextmanager
def listening(modules: Mapping[Key, torch.nn.Module]) -> Iterator[tuple[dict[Key, torch.Tensor], list[torch.Tensor]]]:
    """Sum up the squares of what enters these modules in every forward inside, at the tokens that the list's one
    element says, [batch, tokens], bool."""
    sums: dict[Key, torch.Tensor] = {}
    where: list[torch.Tensor] = []

    def take(key: Key, _module: torch.nn.Module, args: tuple) -> None:
        x = args[0]
        if x.shape[:-1].numel() != where[0].numel():
            raise UsageError(f"{key} is given {list(x.shape[:-1])} inputs and not every token, so it cannot be scored")
        squares = x.reshape(-1, x.shape[-1])[where[0].flatten()].double().square().sum(0)
        sums[key] = sums[key] + squares if key in sums else squares

    handles = [module.register_forward_pre_hook(partial(take, key)) for key, module in modules.items()]
    try:
        yield sums, where
    finally:
        for handle in handles:
            handle.remove()
