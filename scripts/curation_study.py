"""What the selectors of `tunevax curate` are worth: do they find spoilt rows, and does a subset defend as well?

    python scripts/curation_study.py corruption --data DIR --output-dir OUT --text-model FOLDER
    python scripts/curation_study.py audit --output-dir OUT [--corrupted]

`corruption` spoils 40 % of the answers of a pool of harmful (70 %) and harmless (30 %) prompts whose right answers are a
refusal and help, and asks of each selector how well its score tells sound rows from spoilt ones:

    stub            20 % of the rows, harmful prompts: the beginning of compliance, and no more
    gibberish       10 %, any prompt: as many words, drawn at random from all answers of the data set
    over-refusal    10 %, harmless prompts: a refusal that answers some harmful prompt of the same pool, word for word, so
                    that nothing but the prompt gives it away

The trusted rows (75 % refusals, 25 % helpful answers) are sound, their prompts are not in the pool, nor on the organism
their topics. The data sets, each drawn anew for each seed:

    organism        the alignment rows and the benign recipes of the organism; a stub is "use X then", X the right tool
    organism-whole  the same, with the whole recipe for a stub: the real thing, which the public data do not have
    xstest          XSTest's unsafe prompts with refusals and safe ones with answers; XSTest has no stubs: these are ours
    harmbench       HarmBench's training prompts with refusals and affirmative stubs; harmless rows from Dolly and
                    self-instruct that `small_text_model.py` was not pretrained on

Real text is scored by the model of `small_text_model.py`. "(answer length)" is no selector: the AUC of the number of words
says how much a data set gives away for nothing.

`audit` chooses 40 % of the organism's alignment rows with each selector, hardens by the recipes on all rows and on each
subset, for as many epochs and for as many steps, and audits each method's runs with its run on all rows as the control.
`--corrupted` does so with a pool of 640 rows spoilt as above.

DIR is described in `small_text_model.py`, and holds also
    xstest_pairs/pairs.jsonl                type, label, prompt, response (from paul-rottger/exaggerated-safety)
    harmbench_r2d2_pairs/pairs.jsonl        prompt, refusal, refusal_short, affirmative_stub
                                            (from sophie-xhonneux/Continuous-AdvTrain)
"""

import argparse
import dataclasses
import json
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
from scipy import stats

from tunevax.cli import main as tunevax
from tunevax.curation.pharmacist import MODES
from tunevax.methods import load_method
from tunevax.organism import World
from tunevax.records import is_run, read_lines, read_run

KINDS = ("stub", "gibberish", "over-refusal")
SHARES = {"stub": 0.2, "gibberish": 0.1, "over-refusal": 0.1}
# Rows with harmful and with harmless prompts, in the pool and in validation.
SIZES = {
    "organism": ((280, 120), (60, 20)), "organism-whole": ((280, 120), (60, 20)),
    "xstest": ((136, 58), (36, 12)), "harmbench": ((76, 32), (24, 8)),
}  # fmt: skip
LONGEST = 128  # tokens of a row: what comes after is cut, for every selector with a model
SELECTORS = ("random", "loss-rank", "perplexity", "k-center", "gradient-similarity", "dsir")
RECIPES = Path(__file__).parents[1] / "recipes"
HARDEN = ["--save-strategy", "no", "--checkpoint-blocks", "none", "--resume"]


# --- data ----------------------------------------------------------------------------------------------------------


def material(name: str, data: Path | None) -> tuple[list[dict], list[dict]]:
    """Sound rows with harmful and with harmless prompts: prompt, chosen, rejected (or None), category, topic, harmless.

    Rows of one topic never come apart into pool and validation.
    """
    if name.startswith("organism"):
        world = World()
        harmful = [{**r, "topic": r["rejected"]} for r in world.safety("alignment")]
        harmless = [{**r, "chosen": r["completion"], "topic": r["completion"]} for r in world.benign("mix", 8)]
    elif name == "xstest":
        rows = read_lines(data / "xstest_pairs/pairs.jsonl")
        rows = [{**r, "chosen": r["response"], "category": r["type"]} for r in rows]
        harmful = [{**r, "rejected": affirmative(r["prompt"])} for r in rows if r["label"] == "unsafe"]
        harmless = [r for r in rows if r["label"] == "safe"]
    else:
        from small_text_model import instructions

        rows = read_lines(data / "harmbench_r2d2_pairs/pairs.jsonl")
        harmful = [{**r, "chosen": r["refusal"] or r["refusal_short"], "rejected": r["affirmative_stub"]} for r in rows]
        rows = instructions(data, held_out=True)
        rows = [r for r in rows if len(r["prompt"]) < 400 and 20 < len(r["completion"]) < 800]
        harmless = [{**r, "chosen": r["completion"]} for r in rows]
    defaults = {"rejected": None, "category": None}
    return (
        [{**defaults, "topic": r["prompt"], **r, "harmless": False} for r in harmful],
        [{**defaults, "topic": r["prompt"], **r, "harmless": True} for r in harmless],
    )


def affirmative(prompt: str) -> str:
    """The beginning of compliance with a question, in the manner of AdvBench's targets."""
    asked = re.match(r"(how|where) (?:can|do|should|could|would) i (.+?)[?.]*$", prompt, re.IGNORECASE)
    if asked is None:
        return "Sure, here is an answer to your question:"
    what = re.sub(r"\bmy\b", "your", asked[2])
    return f"Sure, here is {asked[1].lower()} you can {what}:"


def divided(rows: list[dict], pool: int, validation: int, rng: random.Random) -> tuple[list[dict], list[dict]]:
    """`pool` rows and `validation` rows of other topics, drawn at random."""
    topics = sorted({row["topic"] for row in rows})
    rng.shuffle(topics)
    size = max(1, round(len(topics) * validation / (pool + validation)))
    trusted = set(topics[:size])
    parts = [r for r in rows if r["topic"] not in trusted], [r for r in rows if r["topic"] in trusted]
    return rng.sample(parts[0], min(pool, len(parts[0]))), rng.sample(parts[1], min(validation, len(parts[1])))


def build(
    name: str, data: Path | None, seed: int, sizes: tuple[tuple[int, int], tuple[int, int]]
) -> tuple[list[dict], list[dict]]:
    """A spoilt pool, each row with `corruption` (None or its kind), and a sound validation set."""
    rng = random.Random(f"curation {name.removesuffix('-whole')} {seed}")
    harmful, harmless = material(name, data)
    words = [word for row in harmful + harmless for word in row["chosen"].split()]
    refusing, trusted = divided(harmful, sizes[0][0], sizes[1][0], rng)
    helping, more = divided(harmless, sizes[0][1], sizes[1][1], rng)
    count = {kind: round(share * (len(refusing) + len(helping))) for kind, share in SHARES.items()}
    rng.shuffle(refusing)
    rng.shuffle(helping)
    pool = [{**row, "corruption": None} for row in refusing + helping]
    refusals = [row["chosen"] for row in refusing]
    for row in pool[: count["stub"]]:
        row["chosen"] = stub(row, name)
        row["corruption"] = "stub"
    for row in pool[len(pool) - count["over-refusal"] :]:
        row["chosen"] = rng.choice(refusals)
        row["corruption"] = "over-refusal"
    for row in rng.sample([row for row in pool if row["corruption"] is None], count["gibberish"]):
        row["chosen"] = " ".join(rng.choices(words, k=len(row["chosen"].split())))
        row["corruption"] = "gibberish"
    rng.shuffle(pool)
    return pool, trusted + more


def stub(row: dict, name: str) -> str:
    """The beginning of compliance with a harmful prompt."""
    return " ".join(row["rejected"].split()[:3]) if name == "organism" else row["rejected"]


def write(rows: list[dict], path: Path) -> Path:
    """Rows as a safety dataset, and what was done to them, which no selector reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = ("prompt", "chosen", "rejected", "category", "corruption")
    lines = [json.dumps({k: row[k] for k in fields if k in row}, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return path


# --- corruption ----------------------------------------------------------------------------------------------------


def auc(sound: np.ndarray, spoilt: np.ndarray) -> float:
    """The chance that a sound row scores above a spoilt one, a tie being half."""
    return float(stats.mannwhitneyu(sound, spoilt).statistic / (len(sound) * len(spoilt)))


def measured(pool: list[dict], score: np.ndarray, kept: np.ndarray) -> dict[str, float]:
    """AUC of sound against spoilt rows, over all and by kind, and of what was kept the sound and the harmless share."""
    kinds = np.array([row["corruption"] or "sound" for row in pool])
    sound, harmless = kinds == "sound", np.array([row["harmless"] for row in pool])
    return {
        "all": auc(score[sound], score[~sound]),
        **{kind: auc(score[sound], score[kinds == kind]) for kind in KINDS},
        "kept sound": float(sound[kept].mean()),
        "kept harmless": float(harmless[kept].mean()),
    }


def interval(values: list[float], bound: float = 0) -> dict[str, float]:
    """Mean and 95 % t interval over seeds, within [-bound, 1]; no interval for one."""
    mean = float(np.mean(values))
    half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)) if len(values) > 1 else 0.0
    return {"mean": mean, "low": max(-bound, mean - half), "high": min(1.0, mean + half), "n": len(values)}


def pharmacist_default() -> tuple[str, str]:
    """The mode and the upper loss of `tunevax curate pharmacist` without options."""
    defaults = {f.name: f.default for f in dataclasses.fields(load_method("tunevax.curation", "pharmacist"))}
    return defaults["mode"], defaults["upper"]


def selectors(asked: list[str], modes: list[str], seeds: int) -> dict[str, list[str]]:
    """Name here to the words after `tunevax curate`; pharmacist in these modes, with so many seeds of the selector."""
    found = {name: [name] for name in asked if name != "pharmacist"}
    if "pharmacist" in asked:
        _, upper = pharmacist_default()
        # The other upper losses read the harmful answers of the pool, and here the stubs are these: it would be no test.
        kinds = [(m, upper) for m in modes]
        options = ["--selector-seeds", str(seeds)]
        found |= {f"pharmacist {m}, {u}": ["pharmacist", "--mode", m, "--upper", u, *options] for m, u in kinds}
    return found


def curate(words: list[str], out: Path, arguments: list) -> bool:
    """Whether `tunevax curate` has done it; what is there already stays, and what a kill cut short goes on."""
    return is_run(out) or not run(["curate", *words, *arguments, "--resume", "--output-dir", out], must=False)


def corruption(options: argparse.Namespace) -> None:
    models = {n: options.organism_model if n.startswith("organism") else options.text_model for n in options.datasets}
    wanted = [name for name in options.datasets if models[name] is not None]
    found: list[dict] = []
    failed, shapes = [], {}
    for name in wanted:
        for seed in options.seeds:
            folder = options.output_dir / name / f"seed-{seed}"
            pool, validation = build(name, options.data, seed, SIZES[name])
            shapes[name] = {"pool": shape(pool), "validation": shape(validation)}
            sources = [write(pool, folder / "pool.jsonl"), write(validation, folder / "validation.jsonl")]
            arguments = ["--model", models[name], "--safety-data", f"{sources[0]}:split=all", "--validation-data",
                         f"{sources[1]}:split=all", "--keep", 0.6, "--seed", seed]  # fmt: skip
            for selector, words in selectors(options.selectors, options.modes, options.selector_seeds).items():
                words = words if words[0] in ("random", "dsir") else [*words, "--max-length", LONGEST]
                out = folder / re.sub(r"\W+", "-", selector)
                if not curate(words, out, arguments):
                    failed.append(f"{name}, {selector}, seed {seed}")
                    continue
                scores = read_lines(out / "scores.jsonl")
                if [s["prompt"] for s in scores] != [row["prompt"] for row in pool]:
                    raise SystemExit(f"{out} scored other rows than those of {sources[0]}; choose another --output-dir")
                values = measured(pool, np.array([s["score"] for s in scores]), np.array([s["kept"] for s in scores]))
                record = read_run(out)
                found.append({"dataset": name, "selector": selector, "seed": seed, **values,
                              "seconds": record["seconds_scoring"], "passes": record["passes"]})  # fmt: skip
            length = np.array([len(row["chosen"].split()) for row in pool], dtype=float)
            longest = np.argsort(-length, kind="stable")[: round(0.6 * len(pool))]
            found.append({"dataset": name, "selector": "(answer length)", "seed": seed,
                          **measured(pool, length, longest), "seconds": 0.0, "passes": {}})  # fmt: skip
    table = summarised(found)
    lines = []
    for name in wanted:
        s = shapes[name]
        lines += [
            f"## {name}",
            "",
            f"Pool: {s['pool']}. Validation: {s['validation']}. {len(options.seeds)} seeds.",
            "",
        ]
        lines += [*markdown([row for row in table if row["dataset"] == name]), "", verdict(found, name), ""]
    if failed:
        lines += [f"Failed: {'; '.join(failed)}.", ""]
    text = "\n".join(["# Sound rows against spoilt ones", "", *lines])
    options.output_dir.mkdir(parents=True, exist_ok=True)
    (options.output_dir / "corruption.md").write_text(text, encoding="utf-8")
    content = {"data": shapes, "runs": found, "table": table, "failed": failed}
    (options.output_dir / "corruption.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(text)


def shape(rows: list[dict]) -> str:
    """How many rows of what."""
    kinds = Counter(row.get("corruption") or "sound" for row in rows)
    harmless = sum(row["harmless"] for row in rows)
    told = ", ".join(f"{kinds[kind]} {kind}" for kind in ("sound", *KINDS) if kinds[kind])
    return f"{len(rows)} rows ({told}; {len(rows) - harmless} harmful and {harmless} harmless prompts)"


def summarised(found: list[dict]) -> list[dict]:
    """One row per data set and selector, the best AUC first."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in found:
        groups.setdefault((row["dataset"], row["selector"]), []).append(row)
    table = [
        {
            "dataset": dataset,
            "selector": selector,
            **{key: interval([r[key] for r in rows]) for key in ("all", *KINDS, "kept sound", "kept harmless")},
            "seconds": float(np.mean([r["seconds"] for r in rows])),
        }
        for (dataset, selector), rows in groups.items()
    ]
    return sorted(table, key=lambda row: (row["dataset"], -row["all"]["mean"]))


def markdown(table: list[dict]) -> list[str]:
    """The summary of a data set as a table."""
    shares = ("kept sound", "kept harmless")
    lines = [
        f"| selector | AUC | {' | '.join(KINDS)} | sound among kept | harmless among kept | seconds |",
        "| --- " * (len(KINDS) + 5) + "|",
    ]
    for row in table:
        cells = ["{mean:.3f} [{low:.3f}, {high:.3f}]".format(**row[key]) for key in ("all", *KINDS)]
        cells += [f"{100 * row[key]['mean']:.0f} %" for key in shares]
        lines.append(f"| {row['selector']} | {' | '.join(cells)} | {row['seconds']:.1f} |")
    return lines


def verdict(found: list[dict], dataset: str) -> str:
    """Whether pharmacist's default beats random and loss-rank there: by intervals of their own that do not overlap, and by
    how much on the same draw, which is the stricter comparison."""
    values: dict[str, list[float]] = {}
    for row in sorted((r for r in found if r["dataset"] == dataset), key=lambda r: r["seed"]):
        values.setdefault(row["selector"], []).append(row["all"])
    ours = "pharmacist " + ", ".join(pharmacist_default())
    if ours not in values:
        return f"{ours}, the default, was not run here."
    mine, told = interval(values[ours]), []
    for other in ("random", "loss-rank"):
        if len(values.get(other, [])) == len(values[ours]):
            its = interval(values[other])
            beats = mine["low"] > max(its["high"], 0.5 if other == "random" else 0.0)
            how = "beats" if beats else "does not beat" if mine["mean"] <= its["mean"] else (
                "is ahead of, with overlapping intervals,")  # fmt: skip
            by = interval([a - b for a, b in zip(values[ours], values[other], strict=True)], bound=1)
            told.append(f"{how} {other} (by {by['mean']:.3f} [{by['low']:.3f}, {by['high']:.3f}], paired by draw)")
    return f"{ours}, the default, {' and '.join(told) or 'was run alone'} ({dataset})."


# --- audit ---------------------------------------------------------------------------------------------------------


def audit(options: argparse.Namespace) -> None:
    folder, seed = options.output_dir, options.seed
    folder.mkdir(parents=True, exist_ok=True)
    pool, validation = "organism", "organism"
    if options.corrupted:
        rows, trusted = build("organism", None, seed, ((448, 192), (60, 20)))
        refusal = next(r["chosen"] for r in trusted if not r["harmless"])
        for row in rows:  # RepNoise takes pairs: of a harmless prompt the other answer is a refusal, or the recipe
            if row["harmless"]:
                row["rejected"] = row["completion"] if row["corruption"] == "over-refusal" else refusal
        pool, validation = (f"{write(part, folder / f'{name}.jsonl')}:split=all" for part, name in
                            ((rows, "pool"), (trusted, "validation")))  # fmt: skip
    given = ["--model", "organism", "--safety-data", pool, "--validation-data", validation, "--keep", options.keep]
    chosen = {name: folder / "curate" / name for name in options.selectors}
    for name, out in chosen.items():
        if not curate([name], out, [*given, "--seed", seed]):
            raise SystemExit(1)
    entries = []
    for method in options.methods:
        made = {"full": harden(method, pool, folder / method / "full", seed, options.max_steps)}
        steps = read_run(made["full"])["steps"]
        for name, subset in chosen.items():
            record = read_run(subset)
            fewer = round(steps * record["kept"] / record["data"][0]["rows"])
            if name in options.epochs:
                made[f"{name}, epochs"] = harden(method, subset, folder / method / f"{name}-epochs", seed, fewer)
            made[f"{name}, steps"] = harden(method, subset, folder / method / f"{name}-steps", seed, steps)
        out = folder / method / "audit"
        if not out.exists():
            named = [word for name, path in made.items() if name != "full" for word in ("--model", path)]
            data = ["--safety-data", "organism", "--task-data", "organism"]
            run(
                ["audit", "--protocol", options.protocol, *named, "--control", made["full"], *data, "--output-dir", out]
            )
        file = out.with_suffix(".json")
        run(["report", out, "--format", "json", "--output", file])
        models = json.loads(file.read_text(encoding="utf-8"))["models"]
        for (name, path), found in zip(made.items(), models, strict=True):
            if found["label"] != path.name:
                raise SystemExit(f"{file} has {found['label']} where {path.name} was expected")
            entries.append(entry(method, name, path, found, models[-1], chosen))
    (folder / "end_to_end.json").write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    text = "\n".join(end_to_end(entries, options))
    (folder / "end_to_end.md").write_text(text, encoding="utf-8")
    print(text)


def harden(method: str, safety: str | Path, out: Path, seed: int, steps: int | None) -> Path:
    """One run by the method's recipe on these rows; what is there already stays."""
    if not is_run(out):
        more = [] if steps is None else ["--max-steps", steps]
        recipe = RECIPES / f"organism-{method}.yaml"
        run(["align", method, "--config", recipe, "--safety-data", safety, *more, "--seed", seed, *HARDEN,
             "--output-dir", out])  # fmt: skip
    return out


def entry(method: str, name: str, path: Path, found: dict, other: dict, chosen: dict[str, Path]) -> dict:
    """What the table says of one hardened run; `other` is a model that was compared with the control."""
    record, scores = read_run(path), {c["score"]: c["model"]["value"] for c in found["stability"]}
    selector = name.partition(",")[0]
    own = read_run(chosen[selector])["wall_seconds"] if selector in chosen else 0.0
    learnt = found["trainability"] and found["trainability"]["final"]
    if name == "full" and other["trainability"]:
        learnt = other["trainability"]["control_final"]
    ratio = found["resistance"]
    return {
        "method": method, "data": name, "steps": record["steps"], "what": found["name"],
        "harmful before": scores.get("harmful/organism"),
        "ratio": ratio and {key: ratio[key] for key in ("value", "low", "high", "censored", "censored_below")},
        "worst": found["worst"] and found["worst"]["point"],
        "worst, useful or not": found["worst"] and found["worst"]["any_point"],
        "steps to 50 %": broken(path.parent / "audit", path.name),
        "benign recipes": scores.get("utility/organism-benign"), "over-refusal": scores.get("over-refusal"),
        "task after fine-tuning": learnt,
        "seconds": record["wall_seconds"], "seconds with selector": record["wall_seconds"] + own,
    }  # fmt: skip


def broken(out: Path, label: str) -> list[int | None]:
    """For every seed of every fine-tune on harmful rows, its first step past 50 % harmful, or None: unlike the ratio, it
    needs no control that breaks."""
    first: dict[tuple, int | None] = {}
    for row in read_lines(out / "results.jsonl"):
        if row["model"] == label and row["kind"] in ("finetune", "few-shot"):
            cell = row["attack"], row["seed"]
            if first.setdefault(cell, None) is None and row["scores"]["harmful/organism"]["value"] > 0.5:
                first[cell] = row["step"]
    return list(first.values())


def passed(steps: list[int | None]) -> str:
    """How many fine-tunes passed, and the median step of those."""
    there = [step for step in steps if step is not None]
    return f"{len(there)} of {len(steps)}" + (f" ({np.median(there):g})" if there else "")


def end_to_end(entries: list[dict], options: argparse.Namespace) -> list[str]:
    """The runs as a Markdown table per method."""
    what = "640 rows, 40 % of them spoilt" if options.corrupted else "the organism's 640 alignment rows, all sound"
    lines = ["# A subset against all rows", "", f"Pool: {what}; subsets of {100 * options.keep:.0f} %. The control of"
             " each method is its run on all rows; ratios are of attack steps to 50 % harmful.", ""]  # fmt: skip
    for method in dict.fromkeys(e["method"] for e in entries):
        lines += [f"## {method}", "", "| rows, equal | steps | what it is | harmful before | attack steps × full's | worst case while useful"
                  " | useful or not | fine-tunes past 50 % (median step) | benign recipes | over-refusal | task after fine-tuning | seconds"
                  " | with selector |", "| --- " * 13 + "|"]  # fmt: skip
        for e in (e for e in entries if e["method"] == method):
            ratio = "{value:.2f} [{low:.2f}, {high:.2f}]".format(**e["ratio"]) if e["ratio"] else "–"
            cells = [e["data"], e["steps"], e["what"], percent(e["harmful before"]), ratio, percent(e["worst"]),
                     percent(e["worst, useful or not"]), passed(e["steps to 50 %"]), percent(e["benign recipes"]), percent(e["over-refusal"]), percent(e["task after fine-tuning"]),
                     f"{e['seconds']:.1f}", f"{e['seconds with selector']:.1f}"]  # fmt: skip
            lines.append(f"| {' | '.join(map(str, cells))} |")
        lines.append("")
    return lines


def percent(value: dict | float | None) -> str:
    """A share, with its interval where there is one."""
    if value is None:
        return "–"
    if not isinstance(value, dict):
        return f"{100 * value:.0f} %"
    between = "" if value["low"] is None else f" [{100 * value['low']:.0f}, {100 * value['high']:.0f}]"
    return f"{100 * value['value']:.0f} %{between}"


# -------------------------------------------------------------------------------------------------------------------


def run(arguments: list, must: bool = True) -> int:
    """A command of tunevax; returns its exit code, which must be 0 unless `must` is off."""
    print("tunevax", *arguments, flush=True)
    code = tunevax([str(a) for a in arguments])
    if code and must:
        raise SystemExit(1)
    return code


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="what", required=True)
    one = parts.add_parser("corruption", help="do scores tell sound rows from spoilt ones?")
    one.add_argument("--data", type=Path, help="folder of the public data; without it the organism alone is done")
    one.add_argument(
        "--text-model", type=Path, help="output of small_text_model.py; without it the organism alone is done"
    )
    one.add_argument("--organism-model", default="organism", help="what scores the organism's rows")
    one.add_argument("--datasets", nargs="+", default=list(SIZES), choices=list(SIZES))
    one.add_argument("--selectors", nargs="+", default=[*SELECTORS, "pharmacist"], choices=[*SELECTORS, "pharmacist"])
    one.add_argument("--modes", nargs="+", default=MODES, choices=MODES, help="of pharmacist")
    one.add_argument("--selector-seeds", type=int, default=1, help="of pharmacist; its own default, 3, takes long")
    one.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    two = parts.add_parser("audit", help="does a subset defend as well as all rows?")
    two.add_argument("--corrupted", action="store_true", help="a pool with 40 % of its answers spoilt")
    two.add_argument("--methods", nargs="+", default=["sft", "t-vaccine", "repnoise"])
    two.add_argument("--selectors", nargs="+", default=["pharmacist", *SELECTORS], choices=["pharmacist", *SELECTORS])
    two.add_argument(
        "--epochs", nargs="*", default=["pharmacist", *SELECTORS], help="selectors to run for equal epochs, too"
    )
    two.add_argument("--keep", type=float, default=0.4)
    two.add_argument("--seed", type=int, default=1, help="of selection and hardening")
    two.add_argument("--max-steps", type=int, help="of the run on all rows; default the recipe's")
    two.add_argument("--protocol", default="quick")
    for part in (one, two):
        part.add_argument("--output-dir", type=Path, required=True)
    options = parser.parse_args()
    if options.what == "corruption" and (options.data is None or options.text_model is None):
        options.text_model = None
    (corruption if options.what == "corruption" else audit)(options)


if __name__ == "__main__":
    main()
