"""`tunevax plan`: the memory and compute that a method needs on a GPU, and options that make it fit."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from tunevax.console import as_bytes
from tunevax.errors import UsageError, require, require_one_of
from tunevax.mixins import TrainedModelOptions, option, require_given

if TYPE_CHECKING:
    from tunevax.modeling.trainer import TrainConfig
    from tunevax.planning.step import Prediction

FOLDERS = ("tunevax.alignment", "tunevax.finetuning", "tunevax.curation", "tunevax.restoration")
"""Where a method is looked for; SFT is the same step for a publisher and a provider."""
GIB = 2**30
RESERVE = GIB
"""What a card needs beside what the allocator hands out: CUDA's own context, and gaps between blocks of memory."""
SHARED = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "loss_on", "full_weights", "lora_r",
    "lora_dropout", "lora_targets", "checkpoint_blocks", "optim",
)  # fmt: skip
"""Options that SFT is given to be compared with a method."""
RECOMPUTE = {"none": ("elementwise", "all"), "elementwise": ("frozen", "all"), "frozen": ("all",)}
"""What else `--checkpoint-blocks` may be where a step does not fit."""


@dataclass
class PlanOptions(TrainedModelOptions):
    """What `tunevax plan` takes besides the method's own configuration."""

    method: str | None = option(None, "a method of align, finetune, curate or restore")
    gpu: str | None = option(
        None,
        "memory to fit into, such as 24GB, in GiB as nvidia-smi counts (a card with ECC has up to 6 % less "
        "than its name: 22.5GB for an L4); default: report only",
    )
    device: str = option("cuda", "cuda, or cpu: plan a step there")
    response_length: int | None = option(None, "tokens of a row that are its answer; default half of --max-length")
    format: str = option("text", "text or json")

    def __post_init__(self) -> None:
        from tunevax.modeling.loading import DTYPES
        from tunevax.modeling.quantization import require_quantization

        require_given(self, "model", "method")
        require(self, "response_length", at_least=2)
        require_one_of(self, device=("cuda", "cpu"), format=("text", "json"), dtype=DTYPES)
        require_quantization(self.quantization)
        self.memory()

    def memory(self) -> int | None:
        """`gpu` in bytes; its GB are GiB, its MB MiB."""
        if self.gpu is None:
            return None
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([GM])(?:i?B)?\s*", self.gpu, re.IGNORECASE)
        if not match or float(match[1]) <= 0:
            raise UsageError(
                f"--gpu is {self.gpu!r}; give the memory of the card and its unit, such as 24GB or 24000MB"
            )
        return int(float(match[1]) * (GIB if match[2] in "gG" else 2**20))


class Plan(NamedTuple):
    """A prediction, and whether it fits."""

    needs: Prediction  # for the options as given
    plain: Prediction | None  # of SFT with the same options, by `scaled`; None for a method that trains nothing
    args: Any  # the configuration that was planned
    fits: bool | None = None  # whether `needs` is within the card's memory; None without a card
    changes: tuple[Change, ...] = ()  # what makes it fit, if it does not and something does
    changed: Prediction | None = None  # with these
    refused: tuple[str, ...] = ()  # why some options could not be tried


def plan(options: PlanOptions, method: Any, args: Any) -> Plan:
    """Predict a step of a method, a trainer or what trains nothing, and look for options that fit where it does not.
    Raises `UsageError` if the model's config cannot be read, and for options that the method itself would refuse."""
    import torch

    from tunevax.alignment.sft import SFTConfig, SFTTrainer
    from tunevax.console import bar
    from tunevax.lineage import Lineage
    from tunevax.modeling.checkpoints import config_of
    from tunevax.planning.step import predict, predict_forward, scaled

    if hasattr(args, "plan_training"):
        method, args = args.plan_training()
    models = None if hasattr(method, "config_class") else models_held(method)
    if models == 0:
        raise UsageError(f"{options.method} needs no model, so there is nothing to plan")
    base = Lineage.of(str(options.model)).base
    config = config_of(base, options.revision)
    dtype = None if options.dtype == "auto" else getattr(torch, options.dtype)
    where: dict[str, Any] = {"device": options.device, "dtype": dtype}
    room = None if (limit := options.memory()) is None else limit - RESERVE
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context and getattr(args, "max_length", 0) > context:  # rows are cut there
        args = replace(args, max_length=context)
    if models is not None:
        size = getattr(args, "batch_size", 0), getattr(args, "max_length", 0)
        needs = predict_forward(config, *size, quantization=options.quantization, **where)
        others = (models - 1) * needs.kinds["weights"]
        kinds = {**needs.kinds, "weights": needs.kinds["weights"] + others}
        needs = replace(needs, peak=needs.peak + others, kinds=kinds)
        return Plan(needs, None, args, None if room is None else needs.peak <= room)
    where["response_length"] = options.response_length
    with bar() as progress:
        task = progress.add_task("plan", total=None, note=f"a step of {options.method}")
        needs = predict(method, args, config, quantization=options.quantization, **where)
        progress.update(task, note="SFT beside it")
        shared = SFTConfig(args.output_dir, **{name: getattr(args, name) for name in SHARED})
        plain = scaled(SFTTrainer, shared, config, quantization=options.quantization, **where)
        if room is None or needs.peak <= room:
            return Plan(needs, plain, args, None if room is None else True)
        fixed = sum(needs.kinds[kind] for kind in ("weights", "adapters", "optimiser"))
        refused: dict[str, None] = {}
        for changes in candidates(args, options.quantization):
            progress.update(task, note=f"does not fit; with {words(changes)}?")
            values = {change.name: change.value for change in changes}
            quantization = values.pop("quantization", options.quantization)
            try:
                other = replace(args, **values)
                same = (quantization, other.full_weights) == (options.quantization, args.full_weights)
                if same and fixed > room:
                    continue  # whatever the step itself takes
                if scaled(method, other, config, quantization=quantization, **where).peak > room:
                    continue
                changed = predict(method, other, config, quantization=quantization, **where)
            except UsageError as error:  # not for this method, this model or this installation
                refused[str(error)] = None
                continue
            if changed.peak <= room:
                return Plan(needs, plain, args, False, changes, changed)
    return Plan(needs, plain, args, False, refused=tuple(refused))


def models_held(method: type) -> int:
    """How many models a method that trains nothing holds at most."""
    return getattr(method, "models_held", int("model" in getattr(method, "needs", ("model",))))


class Change(NamedTuple):
    """An option to change, its value, and what that does to the result."""

    name: str
    value: Any
    why: str


def candidates(args: TrainConfig, quantization: str | None) -> Iterator[tuple[Change, ...]]:
    """Options to try where a step does not fit, what costs the user least first."""
    same, modes = "the update is the same", RECOMPUTE.get(args.checkpoint_blocks, ())
    recompute = [
        Change("checkpoint_blocks", m, f"{same}; one more forward pass" if m == "all" else same) for m in modes
    ]
    yield from ((change,) for change in recompute)
    all_of_it = tuple(recompute[-1:])
    batch, accumulated = args.per_device_train_batch_size, args.gradient_accumulation_steps
    why = args.plan_parts(1).split
    parts = [
        (Change("per_device_train_batch_size", part, why),
         Change("gradient_accumulation_steps", accumulated * batch // part, "the batch stays"))
        for part in range(batch - 1, 0, -1) if batch % part == 0
    ]  # fmt: skip
    yield from ((*all_of_it, *part) for part in parts)
    if quantization is None and not args.full_weights:
        rounded = Change("quantization", "nf4", "the update is that of the rounded weights")
        yield (rounded,)
        yield from ((rounded, change) for change in recompute)
        yield from ((rounded, *all_of_it, *part) for part in parts)
    if args.full_weights:
        adapter = (Change("full_weights", False, "an adapter instead of all weights"), *all_of_it)
        yield from (adapter, (*adapter, *(parts[-1] if parts else ())))


def as_dict(plan: Plan, options: PlanOptions) -> dict[str, Any]:
    """The plan as plain values: memory in bytes; of `forward` and `backward`, 1 is a batch through all blocks."""
    names = SHARED[:3] + ("checkpoint_blocks", "full_weights")
    return {
        "model": options.model, "method": options.method, "device": options.device, "gpu": options.memory(),
        "config": {n: getattr(plan.args, n) for n in names if hasattr(plan.args, n)}
        | {"quantization": options.quantization, "dtype": options.dtype, "response_length": options.response_length},
        "reserve": RESERVE, "needs": asdict(plan.needs), "sft": plan.plain and asdict(plan.plain),
        "fits": plan.fits, "changes": [change._asdict() for change in plan.changes],
        "changed": plan.changed and asdict(plan.changed),
    }  # fmt: skip


def lines(plan: Plan, options: PlanOptions) -> Iterator[str]:
    """The plan as text."""
    needs, plain, args = plan.needs, plan.plain, plan.args
    yield f"{options.method} on {options.model}: {needs.parameters / 1e9:.2f} billion weights" + (
        f", {needs.trainable / 1e6:.1f} million numbers train" if needs.trainable else ""
    )
    if plain:
        yield (
            f"batch {args.per_device_train_batch_size} x {args.max_length} tokens, "
            f"recomputed in backward: {args.checkpoint_blocks}, quantised: {options.quantization or 'no'}"
        )
    yield ""
    yield from memory_lines(needs, "peak")
    if plain:
        yield f"{'SFT, same options':20} {as_bytes(plain.peak):>11}"
        yield ""
        yield (
            f"a step: {needs.forward:.2f} forward and {needs.backward:.2f} backward passes through the blocks, "
            f"{needs.flops:.3g} FLOP, {needs.flops / plain.flops:.2f} x SFT"
        )
    if plan.fits is None:
        return
    yield ""
    card = f"{options.gpu} (1 GiB of it for CUDA and gaps)"
    if plan.fits:
        yield f"fits {card}, with {((options.memory() or 0) - RESERVE - needs.peak) / GIB:.1f} GiB to spare"
    elif not plan.changes:
        yield f"does not fit {card}, nor with any option known here; take a larger card or a smaller model"
        yield from (f"  not tried: {why}" for why in plan.refused)
    else:
        yield f"does not fit {card}; fits with"
        yield f"  {words(plan.changes)}"
        yield from (f"    {c.name.replace('_', '-')}: {c.why}" for c in plan.changes)
        yield from memory_lines(plan.changed, "  then, peak") if plan.changed else ()


def words(changes: tuple[Change, ...]) -> str:
    """Changes as options of a command line."""
    return " ".join(f"--{change.name.replace('_', '-')} {str(change.value).lower()}" for change in changes)


def memory_lines(needs: Prediction, title: str) -> Iterator[str]:
    """A peak, and its kinds, largest first, as bars."""
    yield f"{title:20} {as_bytes(needs.peak):>11}"
    for kind, size in sorted(needs.kinds.items(), key=lambda item: -item[1]):
        if size > needs.peak / 1000:
            yield f"  {kind:18} {as_bytes(size):>11}  {'#' * round(40 * size / needs.peak)}".rstrip()
