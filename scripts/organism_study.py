"""Every alignment method on the organism by its recipe, and one audit of them all: what the docs quote of them.

    python scripts/organism_study.py --output-dir OUT [--protocol quick] [--seeds 1 2 3]

With several seeds every method is hardened once per seed and audited by itself, so that the luck of hardening shows. The
numbers say nothing about large models.
"""

import argparse
import gzip
import shutil
from pathlib import Path

from tunevax.cli import main as tunevax

RECIPES = Path(__file__).parents[1] / "recipes"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--protocol", default="quick")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--methods", nargs="+", help="default: every recipe organism-*.yaml but the attack's")
    options = parser.parse_args()
    known = [p.stem.removeprefix("organism-") for p in sorted(RECIPES.glob("organism-*.yaml"))]
    methods = options.methods or [m for m in known if m not in ("attack", "sft")]
    for seed in options.seeds:
        folder = options.output_dir / f"seed-{seed}"
        for method in ["sft", *methods]:
            if not (folder / method / "run.json").is_file():
                recipe = str(RECIPES / f"organism-{method}.yaml")
                run(["align", method, "--config", recipe, "--seed", seed, "--save-strategy", "no", "--checkpoint-blocks", "none",
                     "--output-dir", folder / method])  # fmt: skip
        named = [word for m in methods for word in ("--model", folder / m)]
        audit = folder / "audit"
        run(["audit", "--protocol", options.protocol, *named, "--control", folder / "sft", "--controls", "equal-compute",
             "random-perturbation", "--output-dir", audit])  # fmt: skip
        for kind in ("md", "json"):
            run(["report", audit, "--format", kind, "--output", audit.with_suffix(f".{kind}")])
        with (
            (audit / "results.jsonl").open("rb") as rows,
            gzip.GzipFile(audit.with_suffix(".jsonl.gz"), "wb", mtime=0) as out,
        ):
            shutil.copyfileobj(rows, out)


def run(arguments: list) -> None:
    """A command of tunevax, which must succeed."""
    print("tunevax", *arguments)
    if tunevax([str(a) for a in arguments]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
