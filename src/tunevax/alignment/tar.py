"""TAR: tampering attack resistance (Tamirisa et al., arXiv 2408.00761), first order.

After a start by Random Mapping, each step attacks a copy of the weights and asks how the attacked weights do on
harmful rows that the attack did not see:

    theta_0 = theta;  theta_{k+1} = AdamW(theta_k, grad CE(prompt, rejected)),   k = 0 .. K-1
    G = sum over every n-th k of  s_k grad L_TR(theta_{k+1}; held out)
    s_k = lambda_tr exp(lambda_schedule (k - (K - 1)))
    update:  grad L_retain(theta) + G,   L_retain = CE + lambda_representation mean_l ||h_l(theta) - h_l(start)||_2

G is taken at the attacked weights and applied at theta: d theta_k / d theta is taken as the identity (first order).
L_TR is minus the entropy of the prediction, or, for refusals, the preference loss -log sigmoid(0.1 margin), where the
margin is by how much more than at the start the model prefers `chosen` to `rejected`.

Not here, of the released code: attacks that train on benign rows first, the gate below which the tamper loss stops, its
schedule-free outer optimiser, and the benign fine-tune at the end. The inner learning rates are those of full weights:
a LoRA attack needs about ten times as much (watch `inner_loss_last` in the log).

Random Mapping, the start: L_retain without its second term + mean_l mean_t (1 - |cos(h_l(x)_t, r[x_t])|) on harmful
rows, with r a fixed Gaussian table. All means over tokens are over the response. The attack and the held-out rows are
both alignment rows, parted by prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tunevax.alignment.sft import SFTConfig, SFTTrainer
from tunevax.data.splits import prompt_hash
from tunevax.errors import RunError, UsageError, require, require_one_of
from tunevax.mixins import option
from tunevax.modeling.blocks import find_final_norm, unwrap
from tunevax.modeling.draws import Draws, collated
from tunevax.modeling.gradients import Gradient, add_to_grad, gradient_of, norm_of, require_whole_weights, restored
from tunevax.modeling.hooks import capture, capture_inputs, without_dropout
from tunevax.modeling.loss import CHUNK_ELEMENTS, MIN_CHUNK_ROWS, labelled, last_hidden, logits_of, rows_at
from tunevax.modeling.precision import wide
from tunevax.modeling.trainer import Items, PlanParts
from tunevax.records import Prompt

HELD_OUT_SHARE = 0.2
PREFERENCE_BETA = 0.1


@dataclass
class TARConfig(SFTConfig):
    """Configuration of TAR; the rest as in `SFTConfig`. Defaults are those of the paper's scripts for knowledge;
    its script for refusals has `tamper_loss="preference"`, `mapping_steps=0`, `inner_steps=8`, `tamper_interval=1`,
    `lambda_tr=0.1` and, as it does not ask for the term, `lambda_representation=0`."""

    mapping_steps: float = option(0.5, "steps of Random Mapping at the start, or a share of all steps if below 1")
    inner_steps: int = option(64, "K: steps of the inner attack, each as dear as an SFT step")
    inner_learning_rates: str = option("2e-6,2e-5,4e-5", "of the inner attack: one of these is drawn for each step")
    tamper_interval: int = option(4, "n: inner steps between tamper-resistance losses")
    tamper_loss: str = option("entropy", "entropy, or preference (of chosen to rejected)")
    lambda_tr: float = option(4.0, "weight of the tamper-resistance loss")
    lambda_schedule: float = option(1 / 16, "how fast the weight falls towards the first inner steps")
    lambda_representation: float = option(1.0, "weight of the distance of the hidden states from where they started")

    def __post_init__(self) -> None:
        require_one_of(self, tamper_loss=("entropy", "preference"))
        require(self, "inner_steps", "tamper_interval", at_least=1)
        if self.tamper_interval > self.inner_steps:
            raise UsageError(
                f"tamper_interval is {self.tamper_interval} and there are {self.inner_steps} inner steps, so the "
                "tamper-resistance loss would never be taken; lower --tamper-interval"
            )
        require(self, "lambda_tr", "lambda_schedule", "lambda_representation", "mapping_steps", at_least=0)
        if 0 < self.max_steps <= self.mapping_steps:
            raise UsageError(f"mapping_steps is {self.mapping_steps}, all of the {self.max_steps} steps; lower it")
        if not self.rates() or not all(math.isfinite(rate) and rate > 0 for rate in self.rates()):
            raise UsageError(f"inner_learning_rates is {self.inner_learning_rates!r}; give positive numbers: 2e-5,4e-5")
        super().__post_init__()

    def plan_parts(self, micro_batches: int) -> PlanParts:
        """Inner steps are alike: two rounds of the attack, after a step of Random Mapping if there is one."""
        steps = min(self.inner_steps, 2 * self.tamper_interval)
        mapping = {"max_steps": 2, "mapping_steps": 1} if self.mapping_steps else {}
        return PlanParts({"inner_steps": steps, **mapping}, {"tamper_gradient": self.inner_steps / steps})

    def rates(self) -> list[float]:
        """The learning rates of the inner attack; none if they are not numbers."""
        try:
            return [float(rate) for rate in str(self.inner_learning_rates).split(",")]
        except ValueError:
            return []


class TARTrainer(SFTTrainer):
    """SFT that stays near the representations it started from, with the gradient of an inner attack's outcome."""

    config_class = TARConfig
    paper = "arXiv 2408.00761"
    needs = frozenset({"chosen", "rejected"})
    different = True
    off = {"lambda_tr": 0, "lambda_representation": 0, "mapping_steps": 0}
    args: TARConfig
    kept = ("draws", "spent")

    def prepare(self) -> None:
        """Rows for the inner attack, rows held out from it, and the weights as they were."""
        require_whole_weights(self)
        # {answer: encoded rows}, in the order of `safety_data`
        self.answers = {name: self.encode_answers(self.safety_data, name) for name in ("rejected", "chosen")}
        self.draws = Draws(self.args.seed)
        self.final_norm = find_final_norm(self.model)
        held = [held_out(row["prompt"]) for row in self.safety_data]
        self.adversary = [row for row, out in zip(self.answers["rejected"], held, strict=True) if not out]
        self.held_out = [i for i, out in enumerate(held) if out]
        self.draws.require(self, len(self.adversary), "rows for the inner attack (8 of 10 prompts)")
        self.draws.require(self, len(self.held_out), "rows held out from the inner attack (2 of 10 prompts)")
        # Where the representations started: what trains, as it was. A resumed run starts from the same.
        self.start = [parameter.detach().clone() for parameter in self.parameters]
        self.before: list[torch.Tensor] | None = None  # this micro-batch's hidden states at the start
        self.table: torch.Tensor | None = None  # r, [vocabulary, hidden], on the host
        self.spent = 0.0  # compute so far, in SFT steps

    def parts(self) -> tuple[str, ...]:
        """What enters each block."""
        return ("module",)

    def mapping(self) -> bool:
        """Whether this step belongs to the start by Random Mapping."""
        steps = self.args.mapping_steps
        count = steps if steps >= 1 else round(steps * self.state.max_steps)
        if count >= self.state.max_steps:
            raise UsageError(f"mapping_steps is {steps}, all of the {self.state.max_steps} steps; lower it")
        return self.state.global_step < count

    def training_step(self, model: nn.Module, inputs: dict, num_items_in_batch: Items = None) -> torch.Tensor:
        """The first micro-batch of a step adds the gradient of the mapping, or of the attack's outcome, G; every one
        adds its share of grad L_retain."""
        if self.ready_for != self.state.global_step:
            kind = "mapping" if self.mapping() else "tamper"
            gradient = self.mapping_gradient() if kind == "mapping" else self.tamper_gradient()
            if not torch.isfinite(norm := norm_of(gradient)):
                lower = "--learning-rate" if kind == "mapping" else "--inner-learning-rates or --lambda-tr"
                raise RunError(f"the {kind} gradient is not finite at step {self.state.global_step}; lower {lower}")
            self.note(**{f"{kind}_grad_norm": norm})
            add_to_grad(self, gradient)
            self.spent += self.step_cost()
            self.ready_for = self.state.global_step
        inputs, self.before = self._prepare_inputs(inputs), None
        if self.args.lambda_representation > 0 and not self.mapping():
            # Here, outside of any autocast: it would remember the starting weights for the pass that follows.
            with self.at_start() as started, self.hidden_states() as states:
                last_hidden(started, {k: v for k, v in inputs.items() if k != "labels"})
            self.before = responding(states, inputs)
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch: Items = None
    ) -> torch.Tensor:
        """L_retain: cross entropy, and after the start the distance of all hidden states from the starting ones."""
        if self.before is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with self.hidden_states() as states:  # one forward for both terms
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        after = responding(states, inputs)
        items = len(after[0]) if num_items_in_batch is None else num_items_in_batch
        distances = [(wide(a) - wide(b)).norm(dim=-1).sum() for a, b in zip(after, self.before, strict=True)]
        distance = torch.stack(distances).mean() / items * self.loss_scale(num_items_in_batch)
        share = self.accelerator.reduce(distance.detach(), "mean")  # over ranks; over micro-batches their sum counts
        self.note(representation_distance=share * self.current_gradient_accumulation_steps)
        return loss + self.args.lambda_representation * distance

    def mapping_gradient(self) -> Gradient:
        """Of Random Mapping's loss, on a fresh batch of harmful rows."""
        batches = self.draws.batches(self, self.answers["rejected"])
        items = self.accelerator.reduce(sum((b["labels"] != -100).sum() for b in batches), "sum")
        loss, gradient = gradient_of(self, batches, lambda model, batch: self.mapping_loss(model, batch) / items)
        self.note(mapping_loss=loss)
        return gradient

    def mapping_loss(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """mean_l sum_t (1 - |cos(h_l(x)_t, r[x_t])|) over response tokens t."""
        if self.table is None:
            config, generator = self.model.config.get_text_config(), torch.Generator().manual_seed(self.args.seed)
            self.table = torch.randn(config.vocab_size, config.hidden_size, generator=generator)
        mask = inputs["labels"] != -100
        random = self.table[inputs["input_ids"][mask].cpu()].to(mask.device)
        with self.hidden_states() as states:
            last_hidden(model, {k: v for k, v in inputs.items() if k != "labels"})
        cosines = [torch.nn.functional.cosine_similarity(wide(s[mask]), random, dim=-1) for s in states]
        return (1 - torch.stack(cosines).abs()).mean(0).sum()

    def tamper_gradient(self) -> Gradient:
        """G: of the tamper-resistance loss along one attack on the weights, which come back bit for bit."""
        self.table, args = None, self.args
        rate = float(self.draws.generator.choice(args.rates()))
        held = self.held_out_batches()
        losses, outcomes = [], []
        total: Gradient = {}
        with restored(self.parameters):
            attacker = torch.optim.AdamW(self.parameters, lr=rate, weight_decay=0.01)  # no memory of earlier attacks
            for k in range(args.inner_steps):
                loss, gradient = gradient_of(self, self.draws.batches(self, self.adversary))
                for parameter in self.parameters:
                    parameter.grad = gradient.get(parameter)
                attacker.step()
                losses.append(loss)
                if (k + 1) % args.tamper_interval == 0:
                    outcome, gradient = gradient_of(self, held, self.tamper_share(held))
                    weight = args.lambda_tr * math.exp(args.lambda_schedule * (k - (args.inner_steps - 1)))
                    for parameter, g in gradient.items():
                        total[parameter] = total[parameter].add_(g, alpha=weight) if parameter in total else g * weight
                    outcomes.append(outcome)
        self.note(inner_loss_first=losses[0], inner_loss_last=losses[-1], tamper_loss=torch.stack(outcomes).mean())
        return total

    def held_out_batches(self) -> list[dict[str, Any]]:
        """One held-out batch for a whole attack, as micro-batches {answer: tensors}; for the preference with how
        likely each answer was at the start, {"before": [rows]}."""
        batches = []
        for part in self.draws.indices(self, len(self.held_out)):
            rows = [self.held_out[i] for i in part]
            batch: dict[str, Any] = {k: collated(self, [own[i] for i in rows]) for k, own in self.answers.items()}
            if self.args.tamper_loss == "preference":
                with self.at_start() as model:
                    batch["before"] = margin(model, batch)
            batches.append(batch)
        return batches

    def tamper_share(self, held: Sequence[dict]) -> Callable[[Any, dict], torch.Tensor]:
        """What to give `gradient_of` for L_TR: a mean over the response tokens, or over the rows, of all of `held`."""
        if self.args.tamper_loss == "preference":
            count = torch.tensor(sum(len(b["before"]) for b in held), device=self.args.device)
            rows = self.accelerator.reduce(count, "sum")
            return lambda model, batch: (
                -torch.nn.functional.logsigmoid(PREFERENCE_BETA * (margin(model, batch) - batch["before"])).sum() / rows
            )
        items = self.accelerator.reduce(sum((b["rejected"]["labels"][:, 1:] != -100).sum() for b in held), "sum")
        return lambda model, batch: on_responses(model, batch["rejected"], negative_entropy)[0].sum() / items

    @contextmanager
    def at_start(self) -> Iterator[Any]:
        """The model with the weights it started from, for a forward without graph and dropout."""
        model = self.accelerator.unwrap_model(self.model)
        with restored(self.parameters), torch.no_grad():
            for parameter, weight in zip(self.parameters, self.start, strict=True):
                parameter.copy_(weight)
            with without_dropout([model]), self.compute_loss_context_manager(), self.accelerator.autocast():
                yield model

    @contextmanager
    def hidden_states(self) -> Iterator[list[torch.Tensor]]:
        """Of the one forward inside, known on exit: what enters each block, and the head; each [batch, tokens,
        hidden]."""
        states: list[torch.Tensor] = []
        with capture_inputs([b.module for b in self.blocks]) as entering, capture({0: self.final_norm}) as last:
            yield states
        states += [*entering.values(), last[0]]

    def step_cost(self) -> float:
        """Compute of this step, in SFT steps. A forward alone is half of one, a third with full weights."""
        if self.mapping():
            return 2
        forward = 1 / (3 if self.args.full_weights else 2)
        answers = 2 if self.args.tamper_loss == "preference" else 1
        outcomes = self.args.inner_steps // self.args.tamper_interval
        references = (self.args.lambda_representation > 0) + (2 if self.args.tamper_loss == "preference" else 0)
        return 1 + self.args.inner_steps + outcomes * answers + references * forward

    def cost(self) -> float:
        """Compute of a step, in SFT steps, the mean so far: K + K / n + 1.5 after the start, 2 in it."""
        return self.spent / max(self.state.global_step, 1)


def held_out(prompt: Prompt) -> bool:
    """Whether a prompt is held out from the inner attack, by its hash: one in five. By the last digits: the first ones
    decide what is an alignment prompt at all, so among those they would hold out none."""
    return int(prompt_hash(prompt)[-8:], 16) < HELD_OUT_SHARE * 16**8


def responding(states: Sequence[torch.Tensor], inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The states that predict a token of the response, each [positions, hidden]."""
    positions, _ = labelled(inputs["labels"])
    return [rows_at(state, positions) for state in states]


def on_responses(
    model: nn.Module, inputs: dict[str, torch.Tensor], value: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """`value(logits, targets)` at each position with a label, [positions], and the row each is in. Logits are made
    chunk by chunk, and again in the backward pass."""
    positions, targets = labelled(inputs["labels"])
    hidden = rows_at(last_hidden(model, {k: v for k, v in inputs.items() if k != "labels"}), positions)
    stock = unwrap(model)
    size = max(MIN_CHUNK_ROWS, CHUNK_ELEMENTS // stock.config.get_text_config().vocab_size)
    values = [
        checkpoint(lambda h, t: value(logits_of(stock, h), t), h, t, use_reentrant=False)
        for h, t in zip(hidden.split(size), targets.split(size), strict=True)
    ]
    return torch.cat(values), positions // (inputs["labels"].shape[1] - 1)


def negative_entropy(logits: torch.Tensor, _targets: torch.Tensor) -> torch.Tensor:
    """Sum_v p log p of each row of logits: between -ln V and 0."""
    log_p = logits.log_softmax(-1)
    return (log_p.exp() * log_p).sum(-1)


def margin(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """log p(chosen) - log p(rejected) of each row, summed over the tokens of the answer."""

    def likelihood(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        values, rows = on_responses(
            model, inputs, lambda logits, targets: -torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        )
        return values.new_zeros(len(inputs["labels"])).index_add(0, rows, values)

    return likelihood(batch["chosen"]) - likelihood(batch["rejected"])
