"""`tunevax demo`: harden the organism four ways, attack all four mildly and strongly, and report."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tunevax.alignment.align import AlignOptions, align
from tunevax.alignment.sft import SFTTrainer
from tunevax.alignment.t_vaccine import TVaccineTrainer
from tunevax.alignment.vaccine import VaccineTrainer
from tunevax.attacks.attack import AttackOptions, attack
from tunevax.attacks.finetune import FinetuneConfig
from tunevax.errors import UsageError
from tunevax.records import is_run, read_run
from tunevax.report import write_report

STEPS = 300
ALIGNMENT: dict[str, Any] = {
    "learning_rate": 2e-3, "per_device_train_batch_size": 16, "max_length": 64, "save_strategy": "no",
    "checkpoint_blocks": "none",
}  # fmt: skip
HARDENED: dict[str, tuple[str, type[SFTTrainer], dict[str, Any]]] = {
    "sft": ("sft", SFTTrainer, {"max_steps": STEPS}),
    "sft-2x": ("sft", SFTTrainer, {"max_steps": 2 * STEPS}),  # T-Vaccine's compute, spent on plain training
    "vaccine": ("vaccine", VaccineTrainer, {"max_steps": STEPS, "rho": 1.0}),
    "t-vaccine": ("t-vaccine", TVaccineTrainer, {"max_steps": STEPS, "rho": 1.0, "gamma": 4, "probe_interval": 100}),
}
ATTACKS: dict[str, dict[str, Any]] = {
    "mild": {"learning_rate": 3e-4, "lora_alpha": 4, "max_steps": 320, "points": 16},
    "strong": {"learning_rate": 1e-3, "lora_alpha": 16, "max_steps": 64, "points": 16},
}
ATTACK: dict[str, Any] = {
    "p": 0.1, "n": 200, "per_device_train_batch_size": 10, "max_length": 64, "lr_scheduler_type": "constant",
    "warmup_steps": 0,
}  # fmt: skip


def demo(folder: Path, overwrite: bool = False) -> Path:
    """Run everything into `folder` and return the report's path. Raises `UsageError` if it would lose other files."""
    started = time.monotonic()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if not overwrite:
            advice = "pass --overwrite to replace an earlier demo, or choose another --output-dir"
            raise UsageError(f"{folder} exists; {advice}")
        if not all(_is_of_demo(path) for path in folder.iterdir()):
            raise UsageError(f"{folder} holds more than an earlier demo; choose another --output-dir")
        shutil.rmtree(folder)
    console = Console()
    console.print("The organism: a tiny Llama that knows made-up recipes, some forbidden. It answers everything.\n")
    for name, (method, trainer, options) in HARDENED.items():
        console.print(f"  align   {name}")
        data = AlignOptions(model="organism", safety_data="organism", task_data="organism")
        align(trainer, method, data, trainer.config_class(str(folder / name), **ALIGNMENT, **options), "tunevax demo")
    for name, options in ATTACKS.items():
        console.print(f"  attack  all four, {name}")
        models = [str(folder / m) for m in HARDENED if m != "sft"]
        targets = AttackOptions(
            model=models, control=str(folder / "sft"), safety_data="organism", task_data="organism",
            benign_data="organism", name=name, judges=["organism", "refusal-keywords"], max_new_tokens=12,
            generation_batch_size=128, limit=40,
        )  # fmt: skip
        attack("finetune", targets, FinetuneConfig(str(folder / f"attack-{name}"), **ATTACK, **options), "tunevax demo")
    report = folder / "report.html"
    headline, overview = write_report([folder / f"attack-{name}" for name in ATTACKS], report)
    assert overview is not None  # something was attacked
    table = Table(*overview.columns[:4], box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for row in overview.rows:
        table.add_row(*row[:4])
    console.print("\n", table, "\n", sep="", highlight=False)
    console.print("\n".join(headline), highlight=False, markup=False)
    console.print(f"\n{time.monotonic() - started:.0f} seconds; open {report}", highlight=False)
    return report


def _is_of_demo(path: Path) -> bool:
    if is_run(path):
        return read_run(path).get("command") == "tunevax demo"
    return path.name == "report.html" or path.suffix == ".partial"
