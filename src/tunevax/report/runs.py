"""The runs around an audit: rows chosen, models hardened, jobs screened, heads analysed, models restored.

How a run of a verb is shown is defined beside the methods whose files it reads, in a module that has

- `summary(run)`: a sentence on the run;
- `sections(provenance, figures)`: sections on all runs of its verbs, without figures for a form that cannot show them;
- `measured(run)`, optional: the content of its files, for JSON;
- `limits(provenance)`, optional: sentences on how the runs affect the report's numbers.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from tunevax.evidence.findings import jsonable
from tunevax.methods import methods
from tunevax.report.blocks import Section
from tunevax.report.provenance import Provenance, Run

METHODS = {
    "curate": "tunevax.curation.show",
    "finetune": "tunevax.finetuning.show",
    "analyze": "tunevax.finetuning.show",
    "restore": "tunevax.restoration.show",
    "align": "tunevax.alignment.show",
}
"""By verb, the module that shows its runs. Other packages add theirs by the entry-point group `tunevax.runs`."""


def sections(provenance: Provenance, figures: bool) -> list[Section]:
    """The sections on the runs that were given or are behind those."""
    return [section for module in _modules(provenance) for section in module.sections(provenance, figures) if section]


def summaries(provenance: Provenance) -> list[str]:
    """A sentence on each of the given runs."""
    sentences = []
    for run in (run for run in provenance.runs if not run.measures):
        plain = f"{run.name}: {run.info.get('verb')} {run.info.get('method') or ''}".rstrip() + "."
        sentences.append(str(module.summary(run)) if (module := _module(run.info.get("verb"))) else plain)
    return sentences


def limits(provenance: Provenance) -> list[str]:
    """How the runs behind a report affect its numbers."""
    return [text for m in _modules(provenance) if hasattr(m, "limits") for text in m.limits(provenance)]


def scored(provenance: Provenance) -> bool:
    """Whether a choice of strength or an analysis among the runs scored a model."""
    parts = [part for run in provenance.behind for part in _measured(run).values() if isinstance(part, dict)]
    lists = [entries for part in parts for entries in part.values() if isinstance(entries, list)]
    return any(isinstance(entry, dict) and bool(entry.get("scores")) for entries in lists for entry in entries)


def as_dict(provenance: Provenance) -> dict[str, Any]:
    """The measurements of the runs, by folder, without the text of rows."""
    parts = {str(run.path): {k: jsonable(v) for k, v in _measured(run).items() if v} for run in provenance.behind}
    return {path: part for path, part in parts.items() if part}


def _module(verb: str | None) -> ModuleType | None:
    name = methods(__name__).get(str(verb))
    return importlib.import_module(name) if name else None


def _modules(provenance: Provenance) -> list[ModuleType]:
    """Those of the runs behind the page, each once, in the order of the verbs."""
    verbs = {run.info.get("verb") for run in provenance.behind}
    return list(dict.fromkeys(m for verb in methods(__name__) if verb in verbs and (m := _module(verb))))


def _measured(run: Run) -> dict[str, Any]:
    module = _module(run.info.get("verb"))
    return module.measured(run) if module is not None and hasattr(module, "measured") else {}
