"""Where numbers come from: the runs behind a page, the models they attacked and those models' ancestors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunevax.console import as_bytes, as_time
from tunevax.data.sources import parse_source
from tunevax.errors import UsageError
from tunevax.evidence.results import Results
from tunevax.lineage import Lineage, find_run
from tunevax.records import DATA, LOG, RESULTS, RunRecord, is_run, read_lines, read_run


@dataclass
class Run:
    """One run folder: run.json as `info`, log.jsonl as `log` (empty without that file)."""

    path: Path
    info: RunRecord
    log: list[dict[str, Any]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """What to call the run on the page."""
        return str(self.info.get("name") or self.info.get("method") or self.path.name)

    @property
    def measures(self) -> bool:
        """Whether it holds results: an attack, a score or an audit."""
        return self.info.get("verb") in ("attack", "score", "audit") or (self.path / RESULTS).exists()


class Library:
    """Run folders, each read once."""

    def __init__(self) -> None:
        self.read: dict[Path, Run] = {}

    def load(self, path: Path) -> Run:
        """One run folder.

        Raises:
            UsageError: it is no run, was written by a newer tunevax, or has a damaged line.
        """
        path = path.resolve()
        if path not in self.read:
            if not is_run(path):
                inside = sorted(p.parent.name for p in path.glob("*/run.json"))
                hint = f"; it contains runs, name those: {', '.join(inside[:8])}" if inside else ""
                raise UsageError(f"{path} is not a run folder (no run.json){hint}")
            info, log = read_run(path), path / LOG
            if not isinstance(info.get("schema"), int):
                raise UsageError(f"{path / 'run.json'} has no schema version; is it a tunevax run?")
            self.read[path] = Run(path, info, read_lines(log))
        return self.read[path]

    def chain(self, ref: str | None, start: Path) -> list[Run | str]:
        """A model's run and the run's ancestors, youngest first; a string is a model that is no readable run."""
        links: list[Run | str] = []
        for link in Lineage.of(ref, start).history if ref else ():
            if not link.record:
                return [*links, link.ref]
            links.append(self.load(link.path))
        return links


@dataclass
class Provenance:
    """The runs that were given, and what is behind them.

    Attributes:
        runs: in the order given. chains: by label of a model, its chains (more than one if the label is ambiguous).
        inputs: by folder of a run, the runs that made something it took in besides a model: chosen rows, a lock.
    """

    runs: list[Run]
    chains: dict[str, list[list[Run | str]]]
    inputs: dict[Path, list[Run]] = field(default_factory=dict)

    @property
    def notes(self) -> list[str]:
        """What a reader must know about them."""
        return [
            f"The label {label} stands for more than one model; see its provenance."
            for label, found in self.chains.items()
            if len({link.path if isinstance(link, Run) else link for link, *_ in found}) > 1
        ]

    @property
    def measurements(self) -> list[Run]:
        """The runs that hold results."""
        return [run for run in self.runs if run.measures]

    @property
    def protocols(self) -> list[dict[str, Any]]:
        """The protocols of the audits among the runs, as resolved."""
        found = [(run.info.get("config") or {}).get("protocol") for run in self.measurements]
        return [p for p in found if isinstance(p, dict)]

    def threshold(self, name: str, default: float) -> float:
        """`phi` or `epsilon` as the audits set it.

        Raises:
            UsageError: two audits set it differently.
        """
        values = {float(p[name]) for p in self.protocols if name in p} or {default}
        if len(values) > 1:
            told = " and ".join(f"{v:g}" for v in sorted(values))
            raise UsageError(
                f"these audits differ in {name} ({told}), so one page cannot judge them; report each alone"
            )
        return values.pop()

    @property
    def behind(self) -> list[Run]:
        """The given runs, and every run that they descend from or took something of, each once."""
        linked = [link for found in self.chains.values() for chain in found for link in chain]
        return list({run.path: run for run in [*self.runs, *linked] if isinstance(run, Run)}.values())

    @property
    def aligned(self) -> list[tuple[str, Run]]:
        """(label, run) of every align run that was given or that a measured model descends from."""
        found: dict[Path, tuple[str, Run]] = {}
        for label, chains in self.chains.items():
            for chain in chains:
                for link in chain:
                    if isinstance(link, Run) and link.info.get("verb") == "align":
                        found.setdefault(link.path, (label if link is chain[0] else link.name, link))
        return list(found.values())


def trace(library: Library, runs: list[Run], results: Results | None) -> Provenance:
    """Follow every measured model, the control first, and every other given run to its ancestors."""
    chains: dict[str, list[list[Run | str]]] = {label: [] for label in results.models} if results else {}
    for run in runs:
        cells = [c for c in results.cells if run.path in map(Path.resolve, c.folders)] if results else []
        labels = list(dict.fromkeys(c.model for c in cells))
        targets = run.info.get("targets") or []
        refs = {t["label"]: t.get("ref") for t in targets if isinstance(t, dict) and "label" in t}
        own = Lineage.of(run.path).parent
        for label in labels:
            found = library.chain(refs.get(label) or (own if not targets and len(labels) == 1 else None), run.path)
            if found and found not in chains[label]:
                chains[label].append(found)
        if not run.measures:
            known = (link for found in chains.values() for chain in found for link in chain)
            if not any(link is run for link in known):
                chains.setdefault(run.name, []).append(library.chain(str(run.path), run.path))
                for target in targets[1:]:  # an analysis of two models; the first is its own model
                    found = library.chain(target.get("ref"), run.path)
                    if found and found not in chains.setdefault(str(target.get("label")), []):
                        chains[str(target.get("label"))].append(found)
    taken = _add_inputs(library, runs, chains)
    return Provenance(runs, {label: found for label, found in chains.items() if found}, taken)


def _add_inputs(library: Library, runs: list[Run], chains: dict[str, list[list[Run | str]]]) -> dict[Path, list[Run]]:
    """What each of these runs took in besides a model, by folder, with a chain for each run that made some of it."""
    todo = [*runs, *(link for found in chains.values() for chain in found for link in chain if isinstance(link, Run))]
    seen, taken = {run.path for run in todo}, {}
    while todo:
        run = todo.pop(0)
        taken[run.path] = _inputs(library, run)
        for made in taken[run.path]:
            if made.path not in seen:
                chain = library.chain(str(made.path), made.path)
                chains.setdefault(made.name, []).append(chain)
                fresh = [link for link in chain if isinstance(link, Run) and link.path not in seen]
                seen |= {link.path for link in fresh}
                todo += fresh
    return taken


def _inputs(library: Library, run: Run) -> list[Run]:
    """The curation runs whose rows `run` took, and the run whose safety lock it put on."""
    entries = [(d.get("source"), "curate") for d in run.info.get("data") or []]
    found = []
    for ref, verb in [*entries, ((run.info.get("config") or {}).get("lock"), "restore")]:
        if not isinstance(ref, str) or not ref:
            continue
        path = Path(parse_source(ref).name if verb == "curate" else ref)
        folder = find_run(str(path.parent if path.name in (DATA, "lock.safetensors") else path), run.path)
        if folder and folder != run.path and library.load(folder).info.get("verb") == verb:
            found.append(library.load(folder))
    return found


# ------------------------------------------------------------------------------------------------------ facts


def links(chain: Iterable[Run | str]) -> list[dict[str, Any]]:
    """What the page tells of each run of a chain."""
    return [facts(link) if isinstance(link, Run) else {"title": link, "facts": [], "config": None} for link in chain]


def facts(run: Run) -> dict[str, Any]:
    """One run as a title and (name, value) pairs; what the run did not record is not shown."""
    info, model = run.info, run.info.get("model") or {}
    hardware: Mapping[str, object] = info.get("hardware") or {}
    trained = [f"{model[k]:,} {k}" for k in ("parameters", "trainable") if isinstance(model.get(k), int)]
    wall, peak = info.get("wall_seconds"), info.get("peak_memory_bytes")
    protocol = (info.get("config") or {}).get("protocol")
    protocol = protocol if isinstance(protocol, dict) else {}
    pairs = [
        ("command", info.get("command")),
        ("folder", str(run.path)),
        ("protocol", " · ".join(str(protocol[k]) for k in ("name", "about") if protocol.get(k))),
        ("model", " · ".join(str(x) for x in (model.get("ref"), model.get("class"), *trained) if x)),
        ("model hash", model.get("hash")),
        ("template hash", info.get("template_hash")),
        ("seed", info.get("seed") if not protocol else ", ".join(map(str, protocol.get("seeds") or []))),
        ("steps", info.get("steps")),
        ("cells", info.get("cells")),
        ("started", info.get("started")),
        ("wall time", as_time(wall) if wall is not None else None),
        ("peak memory", as_bytes(peak) if peak is not None else None),
        ("hardware", " · ".join(f"{k.replace('_', ' ')} {v}" for k, v in hardware.items() if v is not None)),
        ("versions", " · ".join(f"{k} {v}" for k, v in (info.get("versions") or {}).items())),
    ]
    pairs += [
        (
            f"data: {d.get('role', '?')}",
            " · ".join(str(x) for x in (d.get("source"), f"{d.get('rows')} rows", d.get("hash")) if x),
        )
        for d in info.get("data") or []
    ]
    for target in info.get("targets") or []:
        told = [target.get("ref"), target.get("hash") and f"hash {target['hash']}"]
        told += [target.get("template_hash") and f"template {target['template_hash']}"]
        told += [f"{n} prompts shared by {roles}" for roles, n in (target.get("overlap") or {}).items() if n]
        told += [f"prompts not recorded by {name}" for name in target.get("unrecorded") or []]
        pairs.append((f"{target.get('role', 'model')}: {target.get('label')}", " · ".join(str(x) for x in told if x)))
    for role, left in (info.get("overlap_dropped") or {}).items():
        pairs.append((f"left out of {role}", f"{left['rows']} rows whose prompt is in another role, see dropped.jsonl"))
    verb, method = info.get("verb", "run"), info.get("method")
    return {
        "title": f"{run.name}: {verb}" + (f" {method}" if method else ""),
        "facts": [(k, v) for k, v in pairs if v not in (None, "")],
        "config": info.get("config"),
    }
