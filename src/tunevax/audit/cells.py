"""The cells of an audit: one attack on one model with one seed, named by the hash of everything that decides it.

The folder `cells` has two files for each: NAME.json with its outcome and rows, and NAME.jsonl.gz with the responses.
results.jsonl is derived from them. A cell is complete once NAME.json exists.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from tunevax import __version__
from tunevax.audit.plan import AuditPlan
from tunevax.audit.protocol import Setting, build
from tunevax.data.sources import contents
from tunevax.mixins import deciding
from tunevax.records import CellRecord, Generation, Target, Traits, digest, read_object


class AuditCell(NamedTuple):
    """One attack on one model with one seed."""

    target: Target
    setting: Setting | None  # the attack; None scores the model as it is
    key: dict[str, Any]  # fields of all its rows
    hash: str  # of the model, the attack, the seed and the data: the name of its file

    @property
    def summary(self) -> str:
        """Model, attack and seed, for progress messages."""
        attack = f"{self.setting.name} · seed {self.key['seed']}" if self.setting else "as it is"
        return f"{self.target['label']} · {attack}"


def cells_of(plan: AuditPlan, chosen: Sequence[Setting], first_seed: bool, others: bool) -> list[AuditCell]:
    """The cells of the settings `chosen`: with the first seed, which includes the models as they are and all seeds of
    attacks that name their own; with the other seeds; or both."""
    evaluation = next(entry for entry in plan.data if entry["role"] == "evaluation")
    drawn_from = [entry for entry in plan.data if entry["role"] in ("attack", "task")]
    decided_by = {name: contents(value) for name, value in deciding(plan.options, "rows").items()}
    scoring = {**decided_by, "data": [e["hash"] for e in plan.data], "tunevax": __version__}
    if plan.exclusion.active:
        scoring["dropped"] = digest(plan.exclusion.summary())
    runs: list[tuple[Setting | None, dict[str, Any], Traits, dict[str, Any]]] = []
    if first_seed:
        seed = plan.protocol.seeds[0]
        runs.append((None, {"kind": "none", "attack": None, "attack_hash": None, "settings": {}, "seed": seed}, {}, {}))
    for setting in chosen:
        values = {k: contents(v) for k, v in setting.values.items()}
        for i, seed in enumerate(setting.seeds):
            if first_seed if i == 0 or setting.named else others:
                config = build(setting.kind, setting.values, seed, None)
                hashed = config.setting_hash(setting.kind, drawn_from, evaluation)
                key = {"kind": setting.kind, "attack": setting.name, "settings": setting.shown, "seed": seed}
                runs.append((setting, {**key, "attack_hash": hashed}, config.traits, values))
    cells = []
    for target in plan.targets:
        for attack, key, traits, values in runs:
            name = digest([target["hash"], target["label"], target["role"], key, values, scoring])
            shown = {"traits": traits} if traits else {}
            cells.append(AuditCell(target, attack, {**key, **shown, "cell": name}, name))
    return cells


def write_cell(folder: Path, outcome: CellRecord, generations: Iterable[Generation]) -> None:
    """Write the two files of a cell atomically, NAME.json last."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in generations)
    compressed = gzip.compress(lines.encode(errors="backslashreplace"), mtime=0)  # mtime=0: reproducible bytes
    content = json.dumps(outcome, default=str).encode()
    for name, data in ((f"{outcome['cell']}.jsonl.gz", compressed), (f"{outcome['cell']}.json", content)):
        part = folder / f"{name}.{os.getpid()}.part"
        part.write_bytes(data)
        part.replace(folder / name)


def read_cell(folder: Path, name: str) -> CellRecord:
    """The outcome of a cell, with its rows."""
    return cast(CellRecord, read_object(folder / f"{name}.json"))
