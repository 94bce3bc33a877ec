"""Pharmacist: learning which alignment rows to keep, in two levels (Liu et al., arXiv 2510.10085).

    min_w  L_up(theta*(w)),    theta*(w) = argmin_theta 1/N sum_i p_i(w) l_i(theta),    p = N softmax(w)

w has one number per row, outside the model; l_i is the mean cross entropy of row i's answer; L_up a loss on trusted
rows. Only the paper's abstract was available: a selector is trained in two levels to rank sound, safety-relevant rows
first, and a core subset is kept. The algorithm here is ours, after its closest published relative (SEAL, ICLR 2025).
theta, a LoRA adapter, follows

    share * L_up(theta) + (1 - share) * mean over the batch of p_i l_i(theta),    share falling from 1 to `upper_end`

and w the mean over the batch of p_i(w) g_i, with g_i constant. `mode` selects g_i:

    single     l_i(theta): keeps rows that are likely under a model trained on trusted rows
    double     l_i(theta) - l_i(theta'), where theta', a second adapter, follows the mean of p_i l_i alone: the gradient
               of the penalty form of the two levels
    unrolled   -<grad L_up(theta), grad l_i(theta)>: the change of the upper loss by one step on row i, to first order

and `upper` selects L_up: the loss of right answers (`refusal`), the same after one normalised step on harmful answers
(`after-attack`), or that loss less a share of the capped loss of harmful answers (`refusal-minus-harmful`). A step
costs 2 forward and backward passes of a batch, 3 for `double`, one more for the last two of `upper`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, cast

import numpy as np
import torch
from scipy.stats import rankdata
from torch import nn

from tunevax.curation.curate import Pool
from tunevax.data.encoding import collate, context_of, encode
from tunevax.errors import UsageError, require, require_one_of
from tunevax.mixins import option
from tunevax.modeling.adapters import factors
from tunevax.modeling.loss import row_losses
from tunevax.modeling.trainer import Items, ProgressCallback, ResponseTrainer, TrainConfig
from tunevax.records import Example, read_object

if TYPE_CHECKING:
    from peft.tuners.lora import Linear
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

MODES = ("single", "double", "unrolled")
Loss = tuple[torch.Tensor, list[torch.Tensor]]
"""A value, and its gradient with respect to the adapter, tensor by tensor."""


@dataclass
class PharmacistConfig(TrainConfig):
    """Pharmacist's options. Defaults that differ from `TrainConfig`: `num_train_epochs=3`,
    `lr_scheduler_type="constant"`, `warmup_steps=0`, `weight_decay=0.0`."""

    num_train_epochs: float = option(3, "passes over the rows")
    lr_scheduler_type: str = option("constant", "learning-rate schedule of the adapter")
    warmup_steps: float = option(0, "warm-up steps, or a share of all steps if below 1")
    weight_decay: float = option(0.0, "weight decay of AdamW")
    mode: str = option("double", "how a row is assessed: single, double, unrolled")
    upper: str = option("refusal", "the upper loss: refusal, after-attack, refusal-minus-harmful")
    upper_end: float = option(0.5, "share of the upper loss in the adapter's at the end; it starts at 1")
    selector_learning_rate: float = option(5e-3, "learning rate of the rows' weights")
    selector_seeds: int = option(3, "runs with a seed each, whose ranks are averaged")
    attack_step: float = option(0.1, "after-attack: length of the harmful step")
    harmful_weight: float = option(0.1, "refusal-minus-harmful: weight of the harmful loss")
    harmful_cap: float = option(5.0, "refusal-minus-harmful: no gain beyond this loss")
    needs: ClassVar[frozenset[str]] = frozenset({"model", "validation"})
    paper: ClassVar[str] = "arXiv 2510.10085"

    def __post_init__(self) -> None:
        require_one_of(self, mode=MODES, upper=UPPER)
        require(self, "upper_end", at_least=0, at_most=1)
        require(self, "selector_learning_rate", "attack_step", "harmful_weight", "harmful_cap", above=0)
        require(self, "selector_seeds", at_least=1)
        if self.full_weights:
            raise UsageError("pharmacist trains an adapter; leave out --full-weights")
        if self.lora_dropout > 0:
            raise UsageError("pharmacist compares losses, which dropout would blur; leave out --lora-dropout")
        if self.gradient_accumulation_steps > 1:
            raise UsageError("pharmacist steps at every batch; raise --per-device-train-batch-size instead")
        if self.fp16:
            raise UsageError("pharmacist weighs gradients itself, without fp16's scaling; use --bf16 or neither")
        super().__post_init__()

    def plan_training(self) -> tuple[type, PharmacistConfig]:
        """The trainer whose memory and time a plan estimates."""
        return PharmacistTrainer, self

    def score(self, pool: Pool) -> np.ndarray:
        """The rows' weights after training, as ranks from 0 to 1, averaged over seeds, [rows]."""
        results = []
        for seed in range(self.seed, self.seed + self.selector_seeds):
            folder = pool.folder / f"seed-{seed}"
            done, part = folder / "done.json", folder / "done.part"
            if not done.exists():
                args = replace(self, seed=seed, output_dir=str(folder))
                loaded = pool.load()
                trainer = PharmacistTrainer(
                    loaded.model, args, safety_data=pool.rows, validation_data=pool.validation,
                    processing_class=loaded.tokenizer, callbacks=[ProgressCallback(f"pharmacist, seed {seed}")],
                )  # fmt: skip
                trainer.train_from_checkpoint()
                content = {"omega": trainer.omega.tolist(), "passes": trainer.passes()}
                part.write_text(json.dumps(content), encoding="utf-8")
                part.replace(done)
            results.append(read_object(done))
        passes = sum(result["passes"] for result in results)
        pool.passes.update(forward=passes, backward=passes)
        return np.mean([rankdata(result["omega"]) / len(pool.rows) for result in results], axis=0)


class PharmacistTrainer(ResponseTrainer):
    """Trains the rows' weights beside an adapter, which `model` gets: `omega` holds their logits, fp32 [rows]. Raises
    `UsageError` for fewer rows than a batch, or no harmful answers where they are needed.

    Args:
        safety_data: the pool, rows with `prompt` and `chosen`, and `rejected` for two of the upper losses.
        validation_data: trusted rows with `prompt` and `chosen`.
    """

    config_class = PharmacistConfig
    needs = frozenset({"chosen", "validation"})
    args: PharmacistConfig
    processing_class: PreTrainedTokenizerBase
    model: PreTrainedModel

    def __init__(
        self, model: PreTrainedModel, args: PharmacistConfig, *, safety_data: Sequence[Example],
        validation_data: Sequence[Example], processing_class: PreTrainedTokenizerBase,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:  # fmt: skip
        rows, size = safety_data, args.per_device_train_batch_size
        if len(rows) < size:
            way = "lower --per-device-train-batch-size, or give more"
            raise UsageError(f"there are {len(rows)} rows and a batch takes {size}; {way}")
        harmful = [row for row in rows if row.get("rejected") and args.upper != "refusal"]
        if args.upper != "refusal" and not harmful:
            raise UsageError(f"--upper {args.upper} needs harmful answers, and no row has `rejected`")
        how = processing_class, args.max_length, args.loss_on, context_of(model)
        self.validation, self.harmful = encode(validation_data, *how, "chosen"), encode(harmful, *how, "rejected")
        numbered = [{**row, "index": i} for i, row in enumerate(encode(rows, *how, "chosen"))]
        super().__init__(model, args, numbered, processing_class, callbacks)
        self.data_collator = lambda rows: {
            **collate(rows, processing_class.pad_token_id), "index": torch.tensor([row["index"] for row in rows])
        }  # fmt: skip
        self.omega = torch.full((len(rows),), 0.1, device=self.args.device, requires_grad=True)
        self.omega_optimizer = torch.optim.Adam([self.omega], args.selector_learning_rate, betas=(0.9, 0.95))
        self.generator = torch.Generator().manual_seed(args.seed)
        self.follower: list[torch.Tensor] = []
        if args.mode == "double":
            self.follower = [p.detach().clone() for p in self.parameters]
            adam = args.learning_rate, (args.adam_beta1, args.adam_beta2), args.adam_epsilon, args.weight_decay
            self.follower_optimizer = torch.optim.AdamW(self.follower, *adam)
        covered = {id(p) for layer in adapted(self.model) for p in factors(layer)}
        if args.mode == "unrolled" and any(id(p) not in covered for p in self.parameters):
            raise UsageError("mode unrolled supports LoRA on linear layers only; name such --lora-targets")
        self.planned = False

    def for_plan(self) -> None:
        """Without the selector's step: on the meta device its gradient has no content."""
        self.planned = True

    def weights(self) -> torch.Tensor:
        """p, [rows]: positive, of mean 1."""
        return len(self.omega) * torch.softmax(self.omega, 0)

    def training_step(self, model: nn.Module, inputs: dict, num_items_in_batch: Items = None) -> torch.Tensor:
        """Set the gradients of theta for the optimiser's step, and step w (and theta')."""
        model.train()
        inputs = self._prepare_inputs(inputs)
        index, batch = inputs["index"], {k: v for k, v in inputs.items() if k != "index"}
        done = self.state.global_step / max(1, self.state.max_steps)
        share = 1 - (1 - self.args.upper_end) * done
        p = self.weights().detach()[index] / len(index)

        upper, upper_gradient = UPPER[self.args.upper](self, self.drawn(self.validation))
        unrolled = self.args.mode == "unrolled"
        with along(self.model, upper_gradient, len(index)) if unrolled else nullcontext() as products:
            lower, gradient, g_i = self.gradient(batch, p)
        if products is not None:
            g_i = -products / p
        if self.args.mode == "double":
            g_i = g_i - self.follow(batch, p)
        if not self.planned:
            self.step_selector(index, g_i)
        for parameter, u, g in zip(self.parameters, upper_gradient, gradient, strict=True):
            parameter.grad = share * u + (1 - share) * g
        loss = share * upper + (1 - share) * lower
        self.require_finite(loss)
        self.note(upper_loss=upper, lower_loss=lower, upper_share=share, weight_spread=self.weights().detach().std())
        return loss

    def gradient(
        self, batch: dict[str, torch.Tensor], weights: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
        """Sum over rows of weight (default: the mean) times loss, its gradient in the adapter, and the rows' losses."""
        if weights is None:
            rows = len(batch["input_ids"])
            weights = torch.full((rows,), 1 / rows, device=self.args.device)
        with self.recompute(), self.accelerator.autocast():
            value, each = row_losses(self.model, batch, weights)
            return value.detach(), list(torch.autograd.grad(value, self.parameters, materialize_grads=True)), each

    def step_selector(self, index: torch.Tensor, g: torch.Tensor) -> None:
        """One step of w on the mean of p_i(w) g_i over the rows `index`."""
        self.omega_optimizer.zero_grad()
        (self.weights()[index] * g).mean().backward()
        self.omega_optimizer.step()

    def follow(self, batch: dict[str, torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
        """One step of theta' on the weighted rows; returns their losses before it."""
        with swapped(self.parameters, self.follower):
            _, gradient, each = self.gradient(batch, weights)
        for tensor, g in zip(self.follower, gradient, strict=True):
            tensor.grad = g
        if self.args.max_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(self.follower, self.args.max_grad_norm)
        if self.optimizer is not None:  # the scheduled rate
            self.follower_optimizer.param_groups[0]["lr"] = self.optimizer.param_groups[0]["lr"]
        self.follower_optimizer.step()
        self.follower_optimizer.zero_grad()
        return each

    def passes(self) -> float:
        """Forward and backward passes per row of the pool in the whole run, those of the trusted rows included."""
        rows = self.state.max_steps * self.args.per_device_train_batch_size
        each = (3 if self.args.mode == "double" else 2) + (self.args.upper != "refusal")
        return each * rows / len(self.omega)

    def drawn(self, rows: Sequence[dict]) -> dict[str, torch.Tensor]:
        """A batch of rows without replacement, from the trainer's own generator."""
        size = min(self.args.per_device_train_batch_size, len(rows))
        chosen = torch.randperm(len(rows), generator=self.generator)[:size].tolist()
        return self._prepare_inputs(collate([rows[i] for i in chosen], self.processing_class.pad_token_id))

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        state = {"omega": self.omega.detach(), "optimizer": self.omega_optimizer.state_dict(),
                 "generator": self.generator.get_state()}  # fmt: skip
        if self.follower:
            state |= {"follower": self.follower, "follower_optimizer": self.follower_optimizer.state_dict()}
        torch.save(state, Path(output_dir, "selector.pt"))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        state = torch.load(Path(checkpoint, "selector.pt"), map_location=self.args.device, weights_only=True)
        kept = [state["omega"], *state.get("follower", [])]
        with torch.no_grad():
            for tensor, saved in zip([self.omega, *self.follower], kept, strict=True):
                tensor.copy_(saved)
        self.omega_optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"].cpu())
        if self.follower:
            self.follower_optimizer.load_state_dict(state["follower_optimizer"])


def after_attack(trainer: PharmacistTrainer, batch: dict[str, torch.Tensor]) -> Loss:
    """The trusted rows' loss at theta - a * grad h / ||grad h||, h that of harmful answers; that point is constant."""
    _, harmful, _ = trainer.gradient(trainer.drawn(trainer.harmful))
    norm = sum((g.square().sum() for g in harmful), harmful[0].new_zeros(())).sqrt() + 1e-12
    size = trainer.args.attack_step / norm
    shifted = [p.detach() - g * size for p, g in zip(trainer.parameters, harmful, strict=True)]
    with swapped(trainer.parameters, shifted):
        return trainer.gradient(batch)[:2]


def refusal_minus_harmful(trainer: PharmacistTrainer, batch: dict[str, torch.Tensor]) -> Loss:
    """The trusted rows' loss less b * min(h, c)."""
    value, gradient, _ = trainer.gradient(batch)
    h, harmful, _ = trainer.gradient(trainer.drawn(trainer.harmful))
    b, cap = trainer.args.harmful_weight, trainer.args.harmful_cap
    if h < cap:
        gradient = [g - b * of_h for g, of_h in zip(gradient, harmful, strict=True)]
    return value - b * h.clamp(max=cap), gradient


UPPER: dict[str, Callable[[PharmacistTrainer, dict[str, torch.Tensor]], Loss]] = {
    "refusal": lambda trainer, batch: trainer.gradient(batch)[:2], "after-attack": after_attack,
    "refusal-minus-harmful": refusal_minus_harmful,
}  # fmt: skip
"""Upper losses by name: (trainer, batch of trusted rows) -> value and gradient."""


@contextmanager
def swapped(parameters: Sequence[torch.nn.Parameter], tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """The parameters hold other values inside; both are as they were on exit."""
    mine = [p.data for p in parameters]
    for parameter, tensor in zip(parameters, tensors, strict=True):
        parameter.data = tensor
    try:
        yield
    finally:
        for parameter, data in zip(parameters, mine, strict=True):
            parameter.data = data


def adapted(model: torch.nn.Module) -> list[Linear]:
    """The linear layers with a LoRA adapter that is not DoRA."""
    layers = [cast("Linear", m) for m in model.modules() if hasattr(m, "lora_A")]
    return [layer for layer in layers if "default" in layer.lora_A and not len(layer.lora_magnitude_vector)]


@contextmanager
def along(model: torch.nn.Module, direction: Sequence[torch.Tensor], rows: int) -> Iterator[torch.Tensor]:
    """Each row's gradient in the adapter times `direction`, [rows], collected in one backward pass over so many rows.

    In a layer y = W x + s B A x, row i's gradients are sums over tokens, s g (A x)^T for B and s (B^T g) x^T for A,
    with g that of y. Their products with a direction dA, dB are s g . (dB A x + B dA x), summed over tokens: no row's
    gradient is formed.
    """
    along_of: dict[torch.Tensor, torch.Tensor] = dict(
        zip((p for p in model.parameters() if p.requires_grad), direction, strict=True)
    )
    products = direction[0].new_zeros(rows)

    def hook(layer: Linear, args: tuple, output: torch.Tensor) -> None:
        if not output.requires_grad:
            return
        (a, b), scale, x = factors(layer), layer.scaling["default"], args[0].detach()

        def collect(g: torch.Tensor) -> None:
            with torch.no_grad(), torch.autocast(g.device.type, enabled=False):
                # Some blocks flatten rows and tokens into one dimension.
                g32, x32 = (t.to(a.dtype).reshape(rows, -1, t.shape[-1]) for t in (g, x))
                through_b = (g32 @ along_of[b]) * (x32 @ a.T)
                through_a = (g32 @ b) * (x32 @ along_of[a].T)
                products.add_((through_a + through_b).sum((1, 2)), alpha=scale)

        output.register_hook(collect)

    with ExitStack() as stack:
        for layer in adapted(model):
            stack.enter_context(layer.register_forward_hook(hook))
        yield products
