"""The sections of a report on alignment: the blocks that were hardened, and the cost; and limits of the numbers."""

from __future__ import annotations

from collections.abc import Iterable

from tunevax.console import as_bytes, as_time
from tunevax.evidence.words import joined
from tunevax.report.blocks import PANELS, Section
from tunevax.report.charts import layer_map
from tunevax.report.figures import bars as drawn
from tunevax.report.provenance import Provenance, Run
from tunevax.report.text import model_of

UNCLIPPED = ("tar", "repnoise")  # their released code clips no gradient
POOLED = ("t-vaccine", "booster", "tar", "repnoise", "circuit-breakers")  # train on the rows' harmful answers
SMALL = 1e-5  # a learning rate at which an adapter's entries are about the spacing of bfloat16


def summary(run: Run) -> str:
    """A sentence on the run."""
    info = run.info
    return f"{run.name}: aligned {model_of(run)} ({info.get('method')}, {info.get('steps', 0):,} steps)."


def sections(provenance: Provenance, figures: bool) -> list[Section]:
    """The blocks that were hardened, and the cost; [] for a form that cannot show figures."""
    if not figures:
        return []
    aligned = provenance.aligned
    maps = [(label, layer_map(f"map{i}", label, run)) for i, (label, run) in enumerate(aligned)]
    hardware = {str(sorted((run.info.get("hardware") or {}).items(), key=str)) for _, run in aligned}
    differ = "; the runs used different hardware, so their bars cannot be compared" if len(hardware) > 1 else ""
    bars = [("wall time", "wall_seconds"), ("peak memory", "peak_memory_bytes")] if aligned else []
    costs = [(name, drawn(key, [_bar(label, run, key) for label, run in aligned], name)) for name, key in bars]
    which = "Sampling probability of each block over training (more colour, more likely) and the blocks that were "
    which += "perturbed (dots, whose area is a share where several steps meet)."
    about = f"As the runs measured it{differ}. Peak memory: all that is live in one step, weights included; on an "
    about += "accelerator, the allocator's."
    return [
        Section("Which layers were hardened", which, panels=[(label, svg) for label, svg in maps if svg][:PANELS]),
        Section("Cost of the hardening", about, panels=costs),
    ]


def _bar(label: str, run: Run, key: str) -> tuple[str, float | None, str]:
    value = run.info.get(key)
    if not isinstance(value, int | float):
        return label, None, "not measured"
    if key == "peak_memory_bytes":
        return label, value, as_bytes(value)
    steps = run.info.get("steps")
    return label, value, as_time(value) + (f", {steps:,} steps" if isinstance(steps, int) else "")


def limits(provenance: Provenance) -> list[str]:
    """How the runs behind a report affect its numbers, as sentences."""
    text, trained = [], [run for run in provenance.behind if run.info.get("verb") in ("align", "finetune")]

    def named(runs: Iterable[Run]) -> str:
        return joined(dict.fromkeys(run.name for run in runs))

    clipped = [r for r in trained if r.info.get("method") in UNCLIPPED and _config(r, "max_grad_norm")]
    if clipped:
        norms = joined(dict.fromkeys(f"{_config(r, 'max_grad_norm'):g}" for r in clipped))
        text.append(
            f"Gradients of {named(clipped)} were clipped at norm {norms}, which the code of these papers does not do."
        )
    half = [r for r in provenance.behind if (r.info.get("model") or {}).get("dtype") in ("bfloat16", "float16")]
    small = [r for r in trained if _config(r, "lora_r") and _config(r, "learning_rate", 1.0) <= SMALL]
    if half and small:
        text.append(
            f"{named(small)} trained an adapter at a learning rate of {SMALL:g} or less, and some weights have 16 "
            "bits: merging such an adapter loses updates smaller than half the spacing of these numbers."
        )
    chosen = {path for path, inputs in provenance.inputs.items() if any(i.info.get("verb") == "curate" for i in inputs)}
    pools = [run for run in trained if run.info.get("method") in POOLED and run.path in chosen]
    if pools:
        text.append(
            f"On chosen rows, {named(pools)} took the harmful answers from these rows only: part of the difference "
            "from training on all rows is due to the smaller harmful pool."
        )
    return text


def _config(run: Run, key: str, default: float = 0.0) -> float:
    value = (run.info.get("config") or {}).get(key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else default
