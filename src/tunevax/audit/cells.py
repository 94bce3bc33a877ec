"""The cells of an audit: one attack on one model with one seed, named by the hash of everything that decides it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tunevax import __version__
from tunevax.audit.plan import AuditPlan
from tunevax.audit.protocol import Setting, build
from tunevax.data.sources import parse_source
from tunevax.files import model_hash
from tunevax.lineage import Lineage
from tunevax.records import LOG, Traits, digest, is_run


class AuditCell(NamedTuple):
    """One attack on one model with one seed.

    Attributes:
        target: label, role and ref. setting: the attack; None scores the model as it is. key: what its rows carry.
        hash: of the model, the attack, the seed and the data: the name of its file.
    """

    target: dict[str, Any]
    setting: Setting | None
    key: dict[str, Any]
    hash: str

    @property
    def told(self) -> str:
        """For the screen: model, attack and seed."""
        attack = f"{self.setting.name} · seed {self.key['seed']}" if self.setting else "as it is"
        return f"{self.target['label']} · {attack}"


SCORING = (
    "judges",
    "metrics",
    "limit",
    "max_new_tokens",
    "generation_batch_size",
    "fluency_model",
    "chat_template",
    "dtype",
    "revision",
    "safety_data",
    "task_data",
    "benign_data",
    "eval_data",
    "task_eval_data",
    "utility_data",
    "perplexity_data",
)
"""The options that a cell's rows depend on, whatever the attack."""


def contents(value: Any) -> Any:
    """An option as what it stands for: a file's or a model's content in place of its name, inside lists too."""
    if isinstance(value, list | tuple):
        return [contents(v) for v in value]
    if not isinstance(value, str):
        return value
    path = Path(parse_source(value.removeprefix("hf:")).name)
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    if is_run(path):
        log = path / LOG
        return [Lineage.of(path).identity, hashlib.sha256(log.read_bytes()).hexdigest() if log.is_file() else None]
    return model_hash(value.removeprefix("hf:")) or value


def cells_of(plan: AuditPlan, chosen: Sequence[Setting], first_seed: bool, others: bool) -> list[AuditCell]:
    """The cells of some settings, the models as they are among the first seed's; and so are all seeds of an attack that
    names its own."""
    evaluation = next(entry for entry in plan.data if entry["role"] == "evaluation")
    drawn_from = [entry for entry in plan.data if entry["role"] in ("attack", "task")]
    decided_by = {k: contents(getattr(plan.options, k)) for k in SCORING}
    scoring = {**decided_by, "data": [e["hash"] for e in plan.data], "tunevax": __version__}
    if plan.exclusion.active:
        scoring["dropped"] = digest(plan.exclusion.summary())
    found = []
    for target in plan.targets:
        if first_seed:
            key = {"kind": "none", "attack": None, "attack_hash": None, "settings": {}, "seed": plan.protocol.seeds[0]}
            found.append(_cell(target, None, key, scoring))
        for setting in chosen:
            for i, seed in enumerate(setting.seeds):
                if first_seed if i == 0 or setting.named else others:
                    config = build(setting.kind, setting.values, seed, None)
                    key = {
                        "kind": setting.kind, "attack": setting.name, "settings": setting.shown, "seed": seed,
                        "attack_hash": config.setting_hash(setting.kind, drawn_from, evaluation),
                    }  # fmt: skip
                    found.append(_cell(target, setting, key, scoring, config.traits))
    return found


def _cell(
    target: dict[str, Any], setting: Setting | None, key: dict[str, Any], scoring: dict[str, Any],
    traits: Traits | None = None,
) -> AuditCell:  # fmt: skip
    values = {k: contents(v) for k, v in setting.values.items()} if setting else {}
    name = digest([target["hash"], target["label"], target["role"], key, values, scoring])
    return AuditCell(target, setting, {**key, **({"traits": traits} if traits else {}), "cell": name}, name)
