"""What a kind of attack says of itself: the base class of every attack's options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from tunevax.data.contamination import Exclusion, Rows
from tunevax.errors import UsageError
from tunevax.lineage import Lineage
from tunevax.mixins import option
from tunevax.records import Example, Traits, digest

if TYPE_CHECKING:
    from tunevax.attacks.context import AttackContext, TargetOptions


class NotApplicable(UsageError):
    """This attack cannot be made on these models; an audit records it and goes on."""


class Work(NamedTuple):
    """What an attack on one model takes: optimiser steps, scorings, and seconds per step if they are known."""

    steps: int = 0
    scorings: int = 1
    step_seconds: float | None = None


class AttackKind:
    """What an attack's options class extends: a dataclass with the fields `output_dir` and `seed`, and `run`.

    A class attribute is one fact about the kind, and all that tunevax knows of it: which properties it counts for, how
    an audit expands it and what its rows carry as `traits`. Its module's first sentence is its line in `tunevax list`.

    Attributes:
        curve: its rows lie along training steps, from step 0 on.
        common_prompts: it is scored on the audit's common evaluation prompts, so its curves may be searched together.
        customer: it takes no more than a fine-tuning service gives: its training, and the model's answers.
        plain: the plain fine-tune, which a screen ranks and other kinds are contrasted with. Not inherited.
        dose_option: the option that is its dose (or its place in the model): the axis of its figure; `dose` in traits.
        in_name: options that its name in an audit always shows.
        default_control: what `tunevax attack` compares with; None is what the model was hardened from.
    """

    curve: ClassVar[bool] = False
    common_prompts: ClassVar[bool] = True
    customer: ClassVar[bool] = False
    plain: ClassVar[bool] = False
    dose_option: ClassVar[str | None] = None
    in_name: ClassVar[tuple[str, ...]] = ()
    default_control: ClassVar[str | None] = None

    output_dir: str | None
    seed: int

    @property
    def needs(self) -> Set[str]:
        """The data it draws from: `harmful`, `task`; of a kind with an option p, by that."""
        p = getattr(self, "p", None)
        return set() if p is None else {name for name, share in (("harmful", p), ("task", 1 - p)) if share > 0}

    @property
    def harmful_rows(self) -> bool:
        """Whether it trains on harmful rows."""
        return getattr(self, "p", 0) > 0

    @property
    def deterministic(self) -> bool:
        """Whether no random choice is left in it, so that an audit runs it with one seed."""
        return False

    @property
    def traits(self) -> Traits:
        """What every row of its results carries of it."""
        return {
            "curve": self.curve, "harmful_rows": self.harmful_rows, "common_prompts": self.common_prompts,
            "customer": self.customer, "dose": self.dose_option, "plain": vars(type(self)).get("plain", False),
        }  # fmt: skip

    def run(self, context: AttackContext) -> None:
        """Do what the attacker would do to `context.target`, and call `context.score` where the results have a row.

        Raises:
            NotApplicable: it cannot be made on this model.
        """
        raise NotImplementedError

    @classmethod
    def expand(cls, options: dict[str, Any], targets: Sequence[Mapping[str, Any]], depth: int) -> dict[str, Any] | None:
        """The options of a protocol with what depends on the models filled in: a list is an axis of a grid. None leaves
        the attack out without a word, because nothing is missing from the evidence.

        Args:
            targets: label, role and ref of the models; empty where only the options are checked.
            depth: blocks of the model.
        """
        return options

    def applies(self, targets: Sequence[Mapping[str, Any]], options: TargetOptions) -> str | None:
        """Why the attack says nothing of these models, or None.

        A model that was defended while it was fine-tuned is only attacked through the service: the defence is in the
        provider's training, and an attacker who trains without it has the weights, which such a defence does not give.

        Raises:
            UsageError: it would compare what cannot be compared.
        """
        return None if self.customer else only_through_the_service(targets)

    def own_rows(self, options: TargetOptions) -> dict[str, list[Example]]:
        """Harmless rows that it reads itself, by role."""
        return {}

    def kept_rows(self, options: TargetOptions, exclusion: Exclusion) -> dict[str, Rows]:
        """Its own rows, without what is left out."""
        return {role: exclusion.benign(role, rows) for role, rows in self.own_rows(options).items()}

    def used(self, ref: str) -> dict[str, list[str]]:
        """Hashes of the prompts, by role, that the model which it attacks was trained on."""
        return Lineage.of(ref).prompts

    def work(self, ref: str) -> Work:
        """What it takes on the model `ref`, for an estimate.

        Raises:
            NotApplicable: it cannot be made on this model.
        """
        return Work()

    def values(self) -> dict[str, Any]:
        """Its options as plain values, without what says only where to write."""
        values = self.to_dict() if hasattr(self, "to_dict") else vars(self)
        return {k: v for k, v in values.items() if k not in ("output_dir", "run_name")}

    def setting_hash(self, method: str, drawn_from: Sequence[Mapping[str, Any]], evaluation: Mapping[str, Any]) -> str:
        """The same for every seed of one setting: of what the rows are drawn from, not of the draw."""
        data = [entry["hash"] for entry in drawn_from]
        values = {**self.values(), "seed": None, "data": data, "evaluation": evaluation["hash"]}
        return digest(values if self.traits["plain"] else {"method": method, **values})


@dataclass
class AttackConfig(AttackKind):
    """The options of an attack that trains no weights."""

    output_dir: str | None = option(None, "the run folder to write")
    seed: int = option(42, "of every random choice of the attack")


def only_through_the_service(targets: Sequence[Mapping[str, Any]]) -> str | None:
    """Why models may be attacked by a customer of the fine-tuning service only; None if none was defended there."""
    for target in targets:
        record = Lineage.of(target["ref"]).record
        if record.get("verb") == "finetune" and (record["method"] != "sft" or record["config"].get("screen") == "drop"):
            return (
                f"{record['method']} defends while the provider trains, so {target['ref']} is judged by poisoning the "
                "customer's data (poisoned-job), never by an attack that goes on without that defence"
            )
    return None
