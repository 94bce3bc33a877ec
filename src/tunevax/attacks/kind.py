"""The base class of every attack's options, which states what kind of attack it is."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from tunevax.data.contamination import Exclusion, Rows
from tunevax.errors import UsageError
from tunevax.lineage import Lineage
from tunevax.mixins import option
from tunevax.records import DataEntry, Example, Target, Traits, digest

if TYPE_CHECKING:
    from tunevax.attacks.context import AttackContext, TargetOptions


class NotApplicable(UsageError):
    """This attack does not apply to these models; an audit records that and continues."""


class Work(NamedTuple):
    """The cost of an attack on one model: optimiser steps, evaluations, and seconds per step if known."""

    steps: int = 0
    scorings: int = 1
    step_seconds: float | None = None


class AttackKind:
    """Base of an attack's options: a dataclass with the fields `output_dir` and `seed`, and `run`.

    The class attributes decide which properties it counts for, how an audit expands it, and the `traits` in its rows.
    The first sentence of its module is its line in `tunevax list`.
    """

    curve: ClassVar[bool] = False  # its rows lie along training steps, from step 0 on
    common_prompts: ClassVar[bool] = True  # scored on the audit's common prompts: its curves may be searched together
    customer: ClassVar[bool] = False  # it needs only what a fine-tuning service offers: training, and answers
    plain: ClassVar[bool] = False  # the plain fine-tune, ranked by a screen, contrasted with others. Not inherited
    dose_option: ClassVar[str | None] = None  # its dose, or position in the model: the axis of its figure
    in_name: ClassVar[tuple[str, ...]] = ()  # options that its name in an audit always shows
    default_control: ClassVar[str | None] = None  # of `tunevax attack`; None: what the target was hardened from

    output_dir: str | None
    seed: int

    @property
    def needs(self) -> Set[str]:
        """The data it draws from: `harmful`, `task`; by default what its option `p` implies."""
        p = getattr(self, "p", None)
        return set() if p is None else {name for name, share in (("harmful", p), ("task", 1 - p)) if share > 0}

    @property
    def harmful_rows(self) -> bool:
        """Whether it trains on harmful rows."""
        return getattr(self, "p", 0) > 0

    @property
    def deterministic(self) -> bool:
        """Whether it makes no random choice, so that an audit runs it with one seed."""
        return False

    @property
    def traits(self) -> Traits:
        """The properties that every row of its results carries."""
        return {
            "curve": self.curve, "harmful_rows": self.harmful_rows, "common_prompts": self.common_prompts,
            "customer": self.customer, "dose": self.dose_option, "plain": vars(type(self)).get("plain", False),
        }  # fmt: skip

    def run(self, context: AttackContext) -> None:
        """Attack `context.target`, and call `context.score` for every row of the results. Raises `NotApplicable`: it
        does not apply to this model."""
        raise NotImplementedError

    @classmethod
    def expand(cls, options: dict[str, Any], targets: Sequence[Target], depth: int) -> dict[str, Any] | None:
        """Fill in the options of a protocol that depend on the models; a list is an axis of a grid. None omits the
        attack silently, because nothing is missing from the evidence.

        Args:
            targets: the models; empty where only the options are checked.
            depth: number of blocks of the model.
        """
        return options

    def applies(self, targets: Sequence[Target], options: TargetOptions) -> str | None:
        """Why the attack does not apply to these models, or None.

        A fine-tuning-stage defence is part of the provider's training and gives the attacker no weights, so a model
        with one is only attacked through the service.

        Raises:
            UsageError: the models cannot be compared.
        """
        return None if self.customer else only_through_the_service(targets)

    def own_rows(self, options: TargetOptions) -> dict[str, list[Example]]:
        """Benign rows that it reads itself, by role."""
        return {}

    def kept_rows(self, options: TargetOptions, exclusion: Exclusion) -> dict[str, Rows]:
        """Its own rows without excluded ones, by role."""
        return {role: exclusion.benign(role, rows) for role, rows in self.own_rows(options).items()}

    def used(self, ref: str) -> dict[str, list[str]]:
        """Hashes of the prompts, by role, that the attacked model was trained on."""
        return Lineage.of(ref).prompts

    def work(self, ref: str) -> Work:
        """Its cost on the model `ref`. Raises `NotApplicable` if it does not apply to it."""
        return Work()

    def values(self) -> dict[str, Any]:
        """Its options as plain values, without the output folder."""
        values = self.to_dict() if hasattr(self, "to_dict") else vars(self)
        return {k: v for k, v in values.items() if k not in ("output_dir", "run_name")}

    def setting_hash(self, method: str, drawn_from: Sequence[DataEntry], evaluation: DataEntry) -> str:
        """A hash that all seeds of one setting share: of the options and of the data that rows are drawn from."""
        data = [entry["hash"] for entry in drawn_from]
        values = {**self.values(), "seed": None, "data": data, "evaluation": evaluation["hash"]}
        return digest(values if self.traits["plain"] else {"method": method, **values})


@dataclass
class AttackConfig(AttackKind):
    """The options of an attack that trains no weights."""

    output_dir: str | None = option(None, "the run folder to write")
    seed: int = option(42, "of every random choice of the attack")


def only_through_the_service(targets: Sequence[Target]) -> str | None:
    """Why these models may only be attacked by a customer of the fine-tuning service; None if they may by anyone."""
    for target in targets:
        record = Lineage.of(target["ref"]).record
        if record.get("verb") == "finetune" and (record["method"] != "sft" or record["config"].get("screen") == "drop"):
            return (
                f"{record['method']} defends during the provider's training, so {target['ref']} is evaluated by "
                "poisoning the customer's data (poisoned-job), not by an attack that trains without the defence"
            )
    return None
