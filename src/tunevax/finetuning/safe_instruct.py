"""SafeInstruct: safety rows among the customer's (Bianchi et al., arXiv 2309.07875; Zong et al., arXiv 2402.02207).

    mode `mix`     min_w  CE(customer rows and S safety rows)
    mode `joint`   min_w  CE(customer batch) + lamb * CE(safety batch)

`mix` adds S rows to the data and takes none away: with epochs fixed, the run is S/n longer than plain fine-tuning, and
the customer's rows are seen as often; with `max_steps` fixed, the run is as long, and the customer's rows are seen less
often by a share of S/(n+S). Say which, or report both. Either way a step has fewer of the customer's rows, harmful ones
among them, in it, and under epochs there are more steps: part of what `mix` wins is dilution, which harmless rows of
any kind would bring too. `joint` leaves the number of steps and the order of the customer's rows alone, and each step
costs two: a safety batch of equal size, drawn at random, comes with every batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from tunevax.data.mixing import mix
from tunevax.errors import require, require_one_of
from tunevax.finetuning.sft import FinetuneTrainer, JobConfig
from tunevax.mixins import option
from tunevax.modeling.draws import Draws
from tunevax.modeling.gradients import labels_in
from tunevax.modeling.loss import head_loss, labelled, last_hidden, rows_at
from tunevax.modeling.precision import wide
from tunevax.modeling.trainer import Items
from tunevax.records import Example


@dataclass
class SafeInstructConfig(JobConfig):
    """Configuration of SafeInstruct; the rest as in `JobConfig`. The papers add 2 to 10 % of safety rows; lamb is
    that of the joint loss in the code of arXiv 2409.01586."""

    mode: str = option("mix", "mix, or joint: a safety batch beside every batch")
    safety_rows: float = option(0.1, "mix: safety rows added, or a share of the customer's rows if below 1")
    lamb: float = option(0.1, "joint: weight of the safety batch")

    def __post_init__(self) -> None:
        require_one_of(self, mode=("mix", "joint"))
        require(self, "safety_rows", "lamb", at_least=0)
        super().__post_init__()


class SafeInstructTrainer(FinetuneTrainer):
    """Fine-tuning on the customer's rows and safe answers."""

    config_class = SafeInstructConfig
    paper = "arXiv 2309.07875"
    needs = frozenset({"task", "chosen"})
    off = {"mode": "mix", "safety_rows": 0}
    args: SafeInstructConfig
    kept = ("draws",)

    def training_rows(self) -> list[Example]:
        """The customer's rows and, under `mix`, safety rows."""
        rows, size = list(self.task_data), self.args.safety_rows
        count = round(size * len(rows) if size < 1 else size)
        if self.args.mode == "mix" and count:
            safe: list[Example] = [{**row, "completion": str(row["chosen"])} for row in self.safety_data]
            rows += mix([], safe, 1.0, count, self.args.seed)
        return rows

    def prepare(self) -> None:
        """Under `joint` the safety rows, and a generator for their batches."""
        self.draws: Draws | None = None
        if self.args.mode == "joint" and self.args.lamb > 0:
            self.safe = self.encode_answers(self.safety_data, "chosen")
            self.draws = Draws(self.args.seed)
            self.draws.require(self, len(self.safe), "safety rows")
        self.waiting: list[tuple[dict, torch.Tensor]] = []  # safety micro-batches of this step, and its labels

    def compute_loss(
        self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch: Items = None
    ) -> torch.Tensor:
        """CE of the customer's micro-batch; under `joint`, and lamb times that of a safety one."""
        if self.draws is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not self.waiting:
            batches = self.draws.batches(self, self.safe)
            items = labels_in(self, batches)
            self.waiting = [(batch, items) for batch in batches]
        safe, safe_items = self.waiting.pop(0)
        # One forward through the wrapped model and not two: DDP must see every parameter's gradient once.
        both = side_by_side(inputs, safe, self.processing_class.pad_token_id)
        with self.accelerator.autocast():
            hidden = last_hidden(model, {k: both[k] for k in ("input_ids", "attention_mask")})
            rows, losses = len(inputs["labels"]), []
            for part, labels in ((slice(0, rows), num_items_in_batch), (slice(rows, None), safe_items)):
                positions, targets = labelled(both["labels"][part])
                scale = wide(hidden.new_ones(())) / (len(positions) if labels is None else labels)
                losses.append(head_loss(model, rows_at(hidden[part], positions), targets, scale))
        self.note(safety_loss=losses[1].detach() * self.current_gradient_accumulation_steps)
        return (losses[0] + self.args.lamb * losses[1]) * self.loss_scale(num_items_in_batch)

    def cost(self) -> float:
        """2 under `joint`."""
        return 1.0 if self.draws is None else 2.0


def side_by_side(first: dict, second: dict, pad_token_id: int) -> dict[str, torch.Tensor]:
    """Two batches as one of `first` rows and then `second`, padded on the right to the wider."""
    width = max(first["input_ids"].shape[1], second["input_ids"].shape[1])
    fill = {"input_ids": pad_token_id, "attention_mask": 0, "labels": -100}
    padded = {
        k: [torch.nn.functional.pad(b[k], (0, width - b[k].shape[1]), value=v) for b in (first, second)]
        for k, v in fill.items()
    }
    return {k: torch.cat(v) for k, v in padded.items()}
