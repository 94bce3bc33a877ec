"""`tunevax audit --compare A B`: two audits side by side, or the reason why they cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tunevax.errors import UsageError
from tunevax.evidence.measure import measure
from tunevax.evidence.results import read_results
from tunevax.records import RunRecord, is_run, read_run


def compare(first: Path, second: Path) -> str:
    """The findings of both audits as text, control and models of each.

    Raises:
        UsageError: one is no audit; or protocol, prompts, judges, budgets, templates or scoring differ (named).
    """
    records: list[tuple[Path, RunRecord]] = []
    for path in (first, second):
        if not is_run(path):
            raise UsageError(f"{path} is no run folder; name two folders that `tunevax audit` wrote")
        records.append((path, read_run(path)))
        if (verb := records[-1][1].get("verb")) != "audit":
            raise UsageError(f"{path} was written by `tunevax {verb}`; name two audits")
    ours, theirs = (_conditions(record) for _, record in records)
    differ = [
        f"{what} differs ({_short(ours.get(what))} in {first}, {_short(theirs.get(what))} in {second})"
        for what in ours | theirs if ours.get(what) != theirs.get(what)
    ]  # fmt: skip
    if differ:
        more = f"; and {len(differ) - 5} more" if len(differ) > 5 else ""
        raise UsageError(f"the audits cannot be compared: {'; '.join(differ[:5])}{more}")
    lines = []
    for path, record in records:
        protocol = record["config"]["protocol"]
        findings = measure(read_results([path]), protocol["phi"], protocol["epsilon"])
        lines += [f"{path} (protocol {protocol['name']}, control {findings.control})"]
        lines += [f"  {sentence}" for sentence in findings.headline]
    if len({next((t.get("hash") for t in r["targets"] if t["role"] == "control"), None) for _, r in records}) > 1:
        lines += ["The controls are different models, so only the ratios to each audit's own control can be compared."]
    return "\n".join(lines)


def _conditions(record: RunRecord) -> dict[str, Any]:
    """What two audits must share, by name, the coarsest first."""
    protocol, in_parts = record["config"]["protocol"], ("name", "about", "attacks", "defaults", "scoring")
    names = ("judges", "limit", "max_new_tokens", "dtype", "utility_data", "perplexity_data", "engine")
    older = {**{n: record["config"].get(n) for n in names}, "fluency_model": record.get("fluency_hash")}
    return {
        **{f"protocol {key}": value for key, value in protocol.items() if key not in in_parts},
        **{f"attack {i}, {key}": v for i, attack in enumerate(protocol["attacks"], 1) for key, v in attack.items()},
        **{f"the attacks' {key}": value for key, value in (protocol.get("defaults") or {}).items()},
        **{f"the {entry['role']} data": entry["hash"] for entry in record["data"]},
        **{name.replace("_", " "): value or None for name, value in record.get("scoring", older).items()},
        "tunevax": record["versions"]["tunevax"],
        "the chat template": sorted({str(t.get("template_hash")) for t in record["targets"]}),
    }


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
