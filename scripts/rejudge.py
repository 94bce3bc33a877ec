"""Judge the stored answers of an audit anew: by today's code, other judges or other references for gibberish.

    python scripts/rejudge.py AUDIT --output-dir OUT [--judges NAME ...] [--fluency-model REF ...]

Nothing is attacked or generated again. OUT is a copy of AUDIT in which the scores on harmful prompts, and nothing else,
are new; without options, by the judges of AUDIT and the references that `tunevax audit` would take today.
"""

import argparse
import json
import shutil
from pathlib import Path

from tunevax.audit.cells import contents
from tunevax.audit.plan import fluency_models
from tunevax.console import bar
from tunevax.data.thoughts import joined
from tunevax.quiet import quiet
from tunevax.runs import read_lines, read_run
from tunevax.scoring.evaluate import judged
from tunevax.scoring.fluency import Reference
from tunevax.scoring.judges import load_judges
from tunevax.scoring.suite import Suite

PLACE = ("model", "attack", "seed", "step")


class Remembered:
    """A reference that reads each answer once: attacked models give the same ones again and again."""

    def __init__(self, ref: str) -> None:
        self.reference, self.known = Reference(ref, batch_size=64), {}

    def __call__(self, prompts: list[str], responses: list[str]) -> list[float | None]:
        new = [pair for pair in dict.fromkeys(zip(prompts, responses, strict=True)) if pair not in self.known]
        if new:
            self.known.update(zip(new, self.reference(*map(list, zip(*new, strict=True))), strict=True))
        return [self.known[pair] for pair in zip(prompts, responses, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("audit", type=Path, help="the run folder of an audit")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--judges", nargs="+", help="default those of the audit")
    parser.add_argument("--fluency-model", nargs="+", help="or none; default as `tunevax audit` has it")
    options = parser.parse_args()
    quiet()
    record = read_run(options.audit)
    control = next(t["ref"] for t in record["targets"] if t["role"] == "control")
    refs, judges = options.fluency_model or fluency_models(control), options.judges or record["config"]["judges"]
    refs = [] if refs == ["none"] else refs
    suite = Suite([], load_judges(judges), fluency=[Remembered(ref) for ref in refs])
    groups: dict[tuple, list[dict]] = {}
    generations = read_lines(options.audit / "generations.jsonl")
    for sample in generations:
        if sample["kind"] == "harmful":
            groups.setdefault(tuple(sample[k] for k in PLACE), []).append(sample)
    results = read_lines(options.audit / "results.jsonl")
    fluency = contents(refs)
    with bar() as progress:
        task = progress.add_task("judge", total=len(results), note="")
        for row in results:
            samples = groups[tuple(row[k] for k in PLACE)]
            scores, new = judged(
                suite._replace(harmful=samples), [joined(s.get("thought"), s["response"]) for s in samples]
            )
            about_harm = ("harmful/", "judged/", "unparsable/", "unanswered", "degenerate")
            row["scores"] = {**scores, **{k: v for k, v in row["scores"].items() if not k.startswith(about_harm)}}
            for sample, verdict in zip(samples, new, strict=True):
                sample |= {k: verdict[k] for k in ("degenerate", "surprise", "verdicts")}
            progress.advance(task)
    shutil.copytree(options.audit, options.output_dir, ignore=shutil.ignore_patterns("report.html"))
    for name, lines in (("results.jsonl", results), ("generations.jsonl", generations)):
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (options.output_dir / name).write_text(text, encoding="utf-8")
    record["config"] |= {"judges": judges, "fluency_model": refs}
    record |= {"fluency_hash": fluency, "rejudged_from": str(options.audit.absolute())}
    (options.output_dir / "run.json").write_text(
        json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    print(
        f"{len(results):,} rows judged again by {', '.join(judges)}; gibberish by {', '.join(refs) or 'form'}: {options.output_dir}"
    )


if __name__ == "__main__":
    main()
