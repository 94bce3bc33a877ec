"""Controls of a hardened run, made from its own record.

- `undefended`: the model that was hardened. A model that resists less was harmed.
- `equal-compute`: plain fine-tuning on the same data, in the same batches, for the steps that the method's compute
  buys. It controls for longer training.
- `equal-steps`: plain fine-tuning for as many steps as the run took. It controls for the data and the steps alone.
- `equal-updates`: plain fine-tuning for as many steps as the run updated each block, on average. It controls for
  learning less, if a method trains only some blocks at a time.
- `random-perturbation`: the method with a random direction of the same size in place of the gradient's. It controls for
  noise of any kind.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tunevax.alignment.align import AlignOptions, align, read_data
from tunevax.alignment.sft import SFTTrainer
from tunevax.data.encoding import TEMPLATES
from tunevax.environment import require_one_process
from tunevax.errors import UsageError, unknown
from tunevax.files import model_hash
from tunevax.lineage import Lineage
from tunevax.methods import load_method, methods
from tunevax.records import DataEntry, ModelInfo, RunRecord, is_run, read_run
from tunevax.training import other_data, replay, resolved

KINDS = ("undefended", "equal-compute", "equal-steps", "equal-updates", "random-perturbation")


class Control(NamedTuple):
    """A model to attack beside the hardened one."""

    label: str  # e.g. `t-vaccine-compute`: the run's folder name and what was changed
    ref: str | None  # of the model; None if the run has no such control
    why: str  # what it is, or why there is none, as a clause


def make_controls(
    run: str | Path, kinds: Sequence[str], folder: str | Path, command: str = "", dry_run: bool = False
) -> list[Control]:
    """Train the controls (of `KINDS`) of the align run `run` into `folder`, one run folder each, in one process.

    A finished control is reused, an unfinished one is continued. `command` is for their own records; `dry_run` checks
    everything and trains nothing. Raises `UsageError`: not an align run, or one without its compute; its model or data
    are missing or have changed; another run is in `folder` under a control's name.
    """
    run, folder = Path(run), Path(folder)
    record: RunRecord = read_run(run) if is_run(run) else {}
    for kind in kinds:
        if kind not in KINDS:
            raise unknown("control", kind, KINDS)
    if record.get("verb") != "align":
        raise UsageError(f"{run} is not a run of tunevax align, so it has no controls of its own")
    require_one_process("making controls")
    out, made = None if dry_run else command, []
    for kind in kinds:
        if kind == "undefended":
            made.append(Control(kind, hardened_from(run, record), f"what {run.name} was hardened from"))
        elif kind == "random-perturbation":
            made.append(random_perturbation(run, record, folder, out))
        else:
            made.append(plain(run, record, folder, out, kind.removeprefix("equal-")))
    return made


def plain(run: Path, record: RunRecord, folder: Path, command: str | None, alike: str) -> Control:
    """SFT for as many steps as make it equal to the run in `alike`: compute, steps or updates. Raises `UsageError`: the
    run, of an earlier tunevax, did not record that."""
    label, name = f"{run.name}-{alike}", run.name
    if record["method"] == "sft":
        return Control(label, None, f"{name} is itself plain fine-tuning")
    compute = record["compute"]["total"] if "compute" in record else None
    amount, why, missing = {
        "compute": (compute, f"the compute of {name}", "what it cost"),
        "steps": (record["steps"], f"as many as {name} took", ""),
        "updates": (record.get("updates_per_block"), f"as many as {name} updated each block", "its updates per block"),
    }[alike]
    if amount is None:
        raise UsageError(f"{run} does not say {missing}; harden again with this tunevax to compare at equal {alike}")
    steps = max(1, round(amount))
    if alike == "updates" and steps == record["steps"]:
        return Control(label, None, f"{name} updates every block at every step, as equal-steps does")
    ref = train(run, record, SFTTrainer, "sft", {"max_steps": steps}, folder / label, command)
    return Control(label, ref, f"plain fine-tuning for {steps} steps, {why}")


def random_perturbation(run: Path, record: RunRecord, folder: Path, command: str | None) -> Control:
    """The run's method with a random direction."""
    label, method = f"{run.name}-random", str(record["method"])
    if method not in methods("tunevax.alignment"):
        raise UsageError(f"{run} was hardened by {method}, which is not installed here; install what adds it")
    trainer = load_method("tunevax.alignment", method)
    changes = replay(record, trainer.config_class, output_dir=str(folder / label)).random_direction()
    if changes is None:
        return Control(label, None, f"{method} does not perturb")
    if changes.items() <= record["config"].items():
        return Control(label, None, f"the perturbation of {run.name} is random itself")
    ref = train(run, record, trainer, method, {**changes, "max_steps": record["steps"]}, folder / label, command)
    return Control(label, ref, f"{run.name} with a random perturbation of the same size")


def train(
    run: Path, record: RunRecord, trainer: type[SFTTrainer], method: str, changes: dict[str, Any], out: Path,
    command: str | None,
) -> str:  # fmt: skip
    """Train as `run` was, but by `trainer` and with `changes`, into `out`, and return that; without a command only
    check that it can be trained."""
    options = replay(record, AlignOptions, resume=True, model=hardened_from(run, record))
    options.revision = options.revision or (record["model"] or ModelInfo()).get("revision")
    if options.chat_template not in (None, *TEMPLATES):  # a file, of which the run has a copy
        copies = [run / kind / "chat_template.jinja" for kind in ("adapter", "model")]
        options.chat_template = str(next((c for c in copies if c.is_file()), options.chat_template))
    try:
        _, _, data = read_data(trainer, method, options)
    except UsageError as error:
        raise UsageError(f"the data that {run} was hardened on cannot be read any more: {error}") from error
    if changed := other_data(record, data):
        raise UsageError(f"{run} cannot be run again: {changed}; restore the old data, or harden again")
    config = replay(record, trainer.config_class, output_dir=str(out), **changes)
    if not is_run(out):
        if command is not None:
            align(trainer, method, options, config, command)
    elif difference := differs(read_run(out), method, resolved(options, config), data):
        raise UsageError(f"{out} is another control than the requested one ({difference}); delete it")
    return str(out)


def hardened_from(run: Path, record: RunRecord) -> str:
    """The reference of the model that `run` started from. Raises `UsageError` if it is missing or its weights have
    changed."""
    ref = str(Lineage.of(run).parent)
    if Path(ref).is_absolute() and not Path(ref).exists():
        raise UsageError(f"{ref}, which {run} was hardened from, is gone; restore it to make controls")
    base = Lineage.of(ref).base
    if (record["model"] or ModelInfo()).get("hash") not in (None, model_hash(base)):
        raise UsageError(f"{base} has other weights than when {run} was hardened from it; restore the old ones")
    return ref


def differs(record: RunRecord, method: str, config: dict[str, Any], data: list[DataEntry]) -> str | None:
    """How a finished run differs from the run of these options, or None."""
    if (record["verb"], record["method"]) != ("align", method):
        return f"made by {record['verb']} {record['method']}"
    for key, value in json.loads(json.dumps(config, default=str)).items():
        if record["config"].get(key, value) != value:
            return f"{key} is {record['config'][key]!r}, not {value!r}"
    return None if [d["hash"] for d in record["data"]] == [d["hash"] for d in data] else "its data is other data"
