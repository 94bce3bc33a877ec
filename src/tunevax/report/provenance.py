"""The runs behind a report: those given, the models they attacked and the ancestors of those models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tunevax.console import as_bytes, as_time
from tunevax.data.sources import parse_source
from tunevax.errors import UsageError
from tunevax.evidence.results import Results
from tunevax.lineage import Lineage, find_run
from tunevax.records import DATA, LOG, RESULTS, ModelInfo, RunRecord, is_run, read_lines, read_run


@dataclass
class Run:
    """One run folder, with its run.json."""

    path: Path
    info: RunRecord

    @classmethod
    def load(cls, path: Path) -> Run:
        """Read a run folder; UsageError if it is no run, or is of a newer tunevax."""
        path = path.resolve()
        if not is_run(path):
            inside = sorted(p.parent.name for p in path.glob("*/run.json"))
            hint = f"; it contains runs, name those: {', '.join(inside[:8])}" if inside else ""
            raise UsageError(f"{path} is not a run folder (no run.json){hint}")
        info = read_run(path)
        if not isinstance(info.get("schema"), int):
            raise UsageError(f"{path / 'run.json'} has no schema version; is it a tunevax run?")
        return cls(path, info)

    @cached_property
    def log(self) -> list[dict[str, Any]]:
        """The rows of log.jsonl, none without that file; UsageError if a line is damaged."""
        return read_lines(self.path / LOG)

    @property
    def name(self) -> str:
        """The name of the run in the report."""
        return str(self.info.get("name") or self.info.get("method") or self.path.name)

    @property
    def measures(self) -> bool:
        """It contains results: an attack, a score or an audit."""
        return self.info.get("verb") in ("attack", "score", "audit") or (self.path / RESULTS).exists()


def chain_of(ref: str | None, start: Path) -> list[Run | str]:
    """A model's run and its ancestors, youngest first; a string is a model that is no readable run."""
    links: list[Run | str] = []
    for link in Lineage.of(ref, start).history if ref else ():
        if not link.record:
            return [*links, link.ref]
        links.append(Run.load(link.path))
    return links


Chains = dict[str, list[list[Run | str]]]
"""By label of a model, its chains, more than one if the label is ambiguous."""


def _linked(chains: Chains) -> list[Run]:
    """The runs in the chains."""
    return [link for several in chains.values() for chain in several for link in chain if isinstance(link, Run)]


@dataclass
class Provenance:
    """The runs that were given, and those behind them."""

    runs: list[Run]  # in the order given
    chains: Chains
    inputs: dict[Path, list[Run]] = field(default_factory=dict)  # by folder, the runs that made its rows or its lock

    @property
    def notes(self) -> list[str]:
        """A sentence on each ambiguous label."""
        return [
            f"The label {label} is used for more than one model; see its provenance."
            for label, several in self.chains.items()
            if len({link.path if isinstance(link, Run) else link for link, *_ in several}) > 1
        ]

    @property
    def measurements(self) -> list[Run]:
        """The runs that contain results."""
        return [run for run in self.runs if run.measures]

    @property
    def protocols(self) -> list[dict[str, Any]]:
        """The protocols of the audits among the runs, as resolved."""
        protocols = [(run.info.get("config") or {}).get("protocol") for run in self.measurements]
        return [p for p in protocols if isinstance(p, dict)]

    def threshold(self, name: str, default: float) -> float:
        """`phi` or `epsilon` as the audits set it; UsageError if two audits differ."""
        values = {float(p[name]) for p in self.protocols if name in p} or {default}
        if len(values) > 1:
            text = " and ".join(f"{v:g}" for v in sorted(values))
            raise UsageError(f"these audits differ in {name} ({text}), so they need one report each")
        return values.pop()

    @property
    def behind(self) -> list[Run]:
        """The given runs, and every run that they descend from or took inputs of, each once."""
        return list({run.path: run for run in [*self.runs, *_linked(self.chains)]}.values())

    @property
    def aligned(self) -> list[tuple[str, Run]]:
        """(label, run) of every align run that was given or that a measured model descends from."""
        aligned: dict[Path, tuple[str, Run]] = {}
        links = ((label, chain, link) for label, chains in self.chains.items() for chain in chains for link in chain)
        for label, chain, link in links:
            if isinstance(link, Run) and link.info.get("verb") == "align":
                aligned.setdefault(link.path, (label if link is chain[0] else link.name, link))
        return list(aligned.values())


def trace(runs: list[Run], results: Results | None) -> Provenance:
    """Follow every measured model, the control first, and every other given run to its ancestors."""
    chains: Chains = {label: [] for label in results.models} if results else {}

    def add(label: str, ref: str | None, start: Path) -> None:
        if (chain := chain_of(ref, start)) and chain not in chains.setdefault(label, []):
            chains[label].append(chain)

    for run in runs:
        cells = [c for c in results.cells if run.path in map(Path.resolve, c.folders)] if results else []
        labels = list(dict.fromkeys(c.model for c in cells))
        targets = run.info.get("targets") or []
        refs = {t["label"]: t.get("ref") for t in targets if isinstance(t, dict) and "label" in t}
        own = Lineage.of(run.path).parent
        for label in labels:
            add(label, refs.get(label) or (own if not targets and len(labels) == 1 else None), run.path)
        if not run.measures and run.path not in [link.path for link in _linked(chains)]:
            add(run.name, str(run.path), run.path)
            for target in targets[1:]:  # an analysis of two models; the first is its own model
                add(str(target.get("label")), target.get("ref"), run.path)
    todo = [*runs, *_linked(chains)]
    seen, taken = {run.path for run in todo}, {}
    while todo:  # what made the inputs besides a model gets a chain of its own
        run = todo.pop(0)
        taken[run.path] = _inputs(run)
        for made in taken[run.path]:
            if made.path not in seen:
                chain = chain_of(str(made.path), made.path)
                chains.setdefault(made.name, []).append(chain)
                fresh = [link for link in chain if isinstance(link, Run) and link.path not in seen]
                seen |= {link.path for link in fresh}
                todo += fresh
    return Provenance(runs, {label: several for label, several in chains.items() if several}, taken)


def _inputs(run: Run) -> list[Run]:
    """The curation runs whose rows `run` took, and the run whose safety lock it applied."""
    entries = [(d.get("source"), "curate") for d in run.info.get("data") or []]
    inputs = []
    for ref, verb in [*entries, ((run.info.get("config") or {}).get("lock"), "restore")]:
        if not isinstance(ref, str) or not ref:
            continue
        path = Path(parse_source(ref).name if verb == "curate" else ref)
        folder = find_run(str(path.parent if path.name in (DATA, "lock.safetensors") else path), run.path)
        if folder and folder != run.path and (made := Run.load(folder)).info.get("verb") == verb:
            inputs.append(made)
    return inputs


def facts(run: Run | str) -> dict[str, Any]:
    """One run as a title and (name, value) pairs, without what it did not record; a model by its name only."""
    if isinstance(run, str):
        return {"title": run, "facts": [], "config": None}
    info, model = run.info, run.info.get("model") or ModelInfo()
    hardware: Mapping[str, object] = info.get("hardware") or {}
    counts = {"parameters": model.get("parameters"), "trainable": model.get("trainable")}
    trained = [f"{count:,} {name}" for name, count in counts.items() if isinstance(count, int)]
    wall, peak = info.get("wall_seconds"), info.get("peak_memory_bytes")
    protocol = (info.get("config") or {}).get("protocol")
    protocol = protocol if isinstance(protocol, dict) else {}
    pairs: list[tuple[str, object]] = [
        ("command", info.get("command")),
        ("folder", str(run.path)),
        ("protocol", " · ".join(str(protocol[k]) for k in ("name", "about") if protocol.get(k))),
        ("model", _dotted(model.get("ref"), model.get("class"), *trained)),
        ("model hash", model.get("hash")),
        ("template hash", info.get("template_hash")),
        ("seed", info.get("seed") if not protocol else ", ".join(map(str, protocol.get("seeds") or []))),
        *((key, info.get(key)) for key in ("steps", "cells", "started")),
        ("wall time", as_time(wall) if wall is not None else None),
        ("peak memory", as_bytes(peak) if peak is not None else None),
        ("hardware", " · ".join(f"{k.replace('_', ' ')} {v}" for k, v in hardware.items() if v is not None)),
        ("versions", " · ".join(f"{k} {v}" for k, v in (info.get("versions") or {}).items())),
    ]
    for d in info.get("data") or []:
        pairs.append((f"data: {d.get('role', '?')}", _dotted(d.get("source"), f"{d.get('rows')} rows", d.get("hash"))))
    for t in info.get("targets") or []:
        shared = (f"{n} prompts shared by {roles}" for roles, n in (t.get("overlap") or {}).items() if n)
        missing = (f"prompts not recorded by {name}" for name in t.get("unrecorded") or [])
        hashes = t.get("hash") and f"hash {t['hash']}", t.get("template_hash") and f"template {t['template_hash']}"
        pairs.append((f"{t.get('role', 'model')}: {t.get('label')}", _dotted(t.get("ref"), *hashes, *shared, *missing)))
    for role, left in (info.get("overlap_dropped") or {}).items():
        pairs.append((f"left out of {role}", f"{left['rows']} rows whose prompt is in another role, see dropped.jsonl"))
    return {
        "title": f"{run.name}: {info.get('verb', 'run')} {info.get('method') or ''}".rstrip(),
        "facts": [(k, v) for k, v in pairs if v not in (None, "")],
        "config": info.get("config"),
    }


def _dotted(*parts: object) -> str:
    return " · ".join(str(part) for part in parts if part)
