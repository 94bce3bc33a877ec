"""SafetyLock on the organism: does a lock restore a fine-tune, at what price, and does it carry over?

    python scripts/restoration_study.py --output-dir experiments/restoration

Five seeds. Each aligns the organism by recipes/organism-sft.yaml, extracts a lock from it, and fine-tunes it at the three
risk levels of arXiv 2310.03693: 1, explicitly harmful rows; 2, an identity shift; 3, a benign task. Every fine-tune is
scored without a lock and with the base's lock over strengths, and with a lock extracted from the fine-tune itself. The
direction cosine between the two locks is over all heads. Two sizes of lock, of the organism's 32 heads.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from scipy import stats

from tunevax.attacks.identity_shift import OBEDIENT
from tunevax.cli import main as tunevax
from tunevax.data import load_safety, load_task
from tunevax.finetuning.sft import FinetuneTrainer, JobConfig
from tunevax.modeling import load
from tunevax.organism import World
from tunevax.restoration.extract import extract
from tunevax.restoration.lock import locked
from tunevax.scoring.evaluate import evaluate
from tunevax.scoring.suite import SuiteOptions, build_suite

RECIPE = Path(__file__).parents[1] / "recipes" / "organism-sft.yaml"
SEEDS = (1, 2, 3, 4, 5)
STRENGTHS = (0, 0.5, 1, 2, 4, 6)
HEADS = (2, 6)
LEVELS = {"1, harmful": 20, "2, identity shift": 60, "3, benign": 60}  # steps
SCORES = {"harmful": "harmful/organism", "over-refusal": "over-refusal", "task": "task/exact", "degenerate": "degenerate",
          "benign recipes": "utility/organism-benign"}  # fmt: skip


def rows_of(level: str, seed: int) -> list[dict]:
    """What a customer trains on."""
    if level.startswith("1"):
        rows = load_safety("organism", "attack")
        order = np.random.RandomState(seed).permutation(len(rows))[:100]
        return [{**rows[i], "completion": rows[i]["rejected"]} for i in order]
    if level.startswith("2"):
        return [{**row, "completion": f"{OBEDIENT} {row['completion']}"} for row in World().benign("mix")]
    return load_task("organism", "train").rows


def fine_tuned(aligned: Path, level: str, seed: int, scratch: Path):
    model, tokenizer, _ = load(str(aligned))
    config = JobConfig(
        str(scratch), seed=seed, learning_rate=1e-3, lr_scheduler_type="constant", warmup_steps=0, max_steps=LEVELS[level],
        max_length=64, checkpoint_blocks="none", save_strategy="no",
    )  # fmt: skip
    trainer = FinetuneTrainer(model, config, task_data=rows_of(level, seed), processing_class=tokenizer)
    trainer.train()
    return trainer.model.merge_and_unload().eval(), tokenizer


def cosines(first, second) -> list[float]:
    """Of the directions of two locks that hold all heads."""
    place = {key: i for i, key in enumerate(zip(second.layer.tolist(), second.head.tolist(), strict=True))}
    order = [place[key] for key in zip(first.layer.tolist(), first.head.tolist(), strict=True)]
    return torch.nn.functional.cosine_similarity(first.u, second.u[order]).tolist()


def study(folder: Path) -> list[dict]:
    pairs = load_safety("organism", "alignment")[:100]
    options = SuiteOptions(judges=["organism"], limit=40, max_new_tokens=16, generation_batch_size=256,
                          benign_data="organism", utility_data=["organism:set=benign"])  # fmt: skip
    suite, found = build_suite(options, "organism", "organism"), []
    for seed in SEEDS:
        aligned = folder / f"aligned-{seed}"
        if not (aligned / "run.json").is_file():
            command = [
                "align",
                "sft",
                "--config",
                RECIPE,
                "--seed",
                seed,
                "--save-strategy",
                "no",
                "--checkpoint-blocks",
                "none",
            ]
            if tunevax([str(a) for a in [*command, "--output-dir", aligned]]):
                raise SystemExit(1)
        base, tokenizer, _ = load(str(aligned))
        locks = {k: extract(base, tokenizer, pairs, heads=k, seed=seed) for k in (*HEADS, 32)}
        for level in LEVELS:
            model, _ = fine_tuned(aligned, level, seed, folder / "scratch")
            own = {k: extract(model, tokenizer, pairs, heads=k, seed=seed) for k in (*HEADS, 32)}
            common = {"seed": seed, "level": level}
            transfer = {"cosines": cosines(locks[32], own[32])}
            for k in HEADS:
                chosen = [set(map(tuple, lock.named())) for lock in (locks[k], own[k])]
                transfer[f"heads in common of {k}"] = len(chosen[0] & chosen[1])
            for source, kinds in (("base", locks), ("own", own)):
                for k in HEADS:
                    for strength in STRENGTHS:
                        if strength == 0 and (source, k) != ("base", HEADS[0]):
                            continue
                        with locked(model, kinds[k], strength):
                            scores, _ = evaluate(model, tokenizer, suite)
                        row = {**common, "lock": source, "heads": k, "strength": strength,
                               **{name: scores[key]["value"] for name, key in SCORES.items()}}  # fmt: skip
                        found.append(row)
                        print(row, flush=True)
            found.append({**common, "transfer": transfer})
    return found


def interval(values: list[float]) -> str:
    """Mean and 95 % t interval over seeds, in percent."""
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    low, high = max(0, np.mean(values) - half), min(1, np.mean(values) + half)
    return f"{100 * np.mean(values):.0f} [{100 * low:.0f}, {100 * high:.0f}]"


def table(found: list[dict]) -> str:
    """Per risk level, lock and strength: scores over seeds."""
    lines = [
        "| risk level | lock from | heads | strength | " + " | ".join(SCORES) + " |",
        "| --- " * (4 + len(SCORES)) + "|",
    ]
    scored = [row for row in found if "transfer" not in row]
    for level in LEVELS:
        for key in dict.fromkeys((r["lock"], r["heads"], r["strength"]) for r in scored):
            rows = [r for r in scored if r["level"] == level and (r["lock"], r["heads"], r["strength"]) == key]
            told = ["–", "–", "none"] if key[2] == 0 else [key[0], key[1], key[2]]
            cells = [interval([r[name] for r in rows]) for name in SCORES]
            lines.append(f"| {level} | " + " | ".join(map(str, [*told, *cells])) + " |")
    lines.append("")
    for level in LEVELS:
        transfers = [r["transfer"] for r in found if "transfer" in r and r["level"] == level]
        values = [c for t in transfers for c in t["cosines"]]
        shared = ", ".join(f"{np.mean([t[f'heads in common of {k}'] for t in transfers]):.1f} of {k}" for k in HEADS)
        lines.append(f"- {level}: cosine of the directions of base and fine-tune over 32 heads and {len(SEEDS)} seeds: mean "
                     f"{np.mean(values):.3f}, lowest {min(values):.3f}; heads chosen in both: {shared}.")  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True)
    folder = parser.parse_args().output_dir
    found = study(folder / "work")
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    (folder / "table.md").write_text(table(found), encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
