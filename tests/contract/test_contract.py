"""The contract over everything that tunevax brings by name: one list of names, one check for each kind."""

import numpy as np
import pytest
import torch

from tunevax import proxy
from tunevax.methods import load_method, methods
from tunevax.testing import (
    TRAINING,
    check_aligner,
    check_attack,
    check_finetuner,
    check_judge,
    check_restorer,
    check_selector,
    run,
    safety_rows,
    small_model,
    task_rows,
)

FEW_STEPS = {
    "t-vaccine": ("--gamma", "2", "--sample-interval", "1", "--probe-interval", "3", "--probe-size", "4"),
    "tar": ("--mapping-steps", "1", "--inner-steps", "2", "--tamper-interval", "1", "--inner-learning-rates", "1e-3,2e-3"),
    "circuit-breakers": ("--target-depths", "0.67"),
    "lisa": ("--k1", "1", "--k2", "2"),
    "safe-instruct": ("--mode", "joint"),
    "ewc": ("--lamb", "10", "--full-weights"),
}  # fmt: skip
"""What a run of four steps on a model of three blocks needs, and what has most to remember between two steps."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("contract")


@pytest.mark.slow
@pytest.mark.parametrize("name", methods("tunevax.alignment"))
def test_aligner(name, folder):
    check_aligner(name, folder, *FEW_STEPS.get(name, ()))


@pytest.mark.slow
@pytest.mark.parametrize("name", methods("tunevax.finetuning"))
def test_finetuner(name, folder):
    check_finetuner(name, folder, *FEW_STEPS.get(name, ()))


def made(folder, name, *arguments):
    """The run folder `name`, made by a command that is run once."""
    if not (folder / name).is_dir():
        run(*arguments, "--output-dir", str(folder / name))
    return str(folder / name)


def tuned(folder):
    """The small model with an adapter, by plain SFT."""
    data = ("--model", small_model(folder), "--safety-data", safety_rows(folder), "--held-out-prompts", "0")
    return made(folder, "tuned", "align", "sft", *data, *TRAINING)


def job(folder):
    """A customer's job on an aligned model."""
    arguments = ("--model", tuned(folder), "--task-data", task_rows(folder), "--max-steps", "4", "--max-length", "48")
    return made(folder, "job", "finetune", "sft", *arguments, "--per-device-train-batch-size", "2")


def lock(folder):
    options = ("--n", "10", "--r", "2", "--heads", "2", "--safety-data", safety_rows(folder))
    return made(folder, "lock", "restore", "extract-lock", "--model", small_model(folder), *options)


def locked(folder):
    return made(folder, "locked", "restore", "safetylock", "--model", small_model(folder), "--lock", lock(folder))


def published(folder):
    """A lock in the published format, two heads of size 16."""
    head = [(np.int64(0), np.full(16, 0.25, np.float16), np.float16(1))]
    torch.save({f"model.layers.{layer}.self_attn.head_out": head for layer in (0, 1)}, folder / "published.safelock")
    return str(folder / "published.safelock")


RESTORED = {
    "extract-lock": lambda folder: (
        ("--n", "10", "--r", "2", "--heads", "2", "--safety-data", safety_rows(folder)),
        None,
    ),
    "safetylock": lambda folder: (("--lock", lock(folder)), tuned(folder)),
    "convert-lock": lambda folder: (("--lock", published(folder)), None),
    "safe-lora": lambda folder: ((), job(folder)),
    "antidote": lambda folder: (("--safety-data", safety_rows(folder)), tuned(folder)),
}
"""By method, options and the model to restore."""


@pytest.mark.slow
@pytest.mark.parametrize("name", methods("tunevax.restoration"))
def test_restorer(name, folder):
    options, model = RESTORED[name](folder)
    check_restorer(name, folder, *options, model=model)


FEW_ROWS = {
    "pharmacist": ("--num-train-epochs", "1", "--selector-seeds", "1", "--per-device-train-batch-size", "4"),
    "gradient-similarity": ("--warmup-epochs", "1", "--batch-size", "4", "--dimension", "64"),
}
TAKE_ORDER = ("random", "dsir", "pharmacist", "gradient-similarity")
"""Two draw a number for each row as it comes, two train on them."""


@pytest.mark.slow
@pytest.mark.parametrize("name", methods("tunevax.curation"))
def test_selector(name, folder):
    check_selector(name, folder, *FEW_ROWS.get(name, ()), any_order=name not in TAKE_ORDER)


def vaccinated(folder):
    """A run that records which blocks it chose."""
    options = ("--gamma", "2", "--max-steps", "3", "--max-length", "48", "--per-device-train-batch-size", "2")
    data = ("--model", small_model(folder), "--safety-data", safety_rows(folder), "--held-out-prompts", "0")
    return made(folder, "vaccinated", "align", "t-vaccine", *data, *options)


CURVE = (
    "--max-steps", "3", "--points", "2", "--n", "8", "--per-device-train-batch-size", "2", "--max-length", "48",
    "--learning-rate", "1e-3", "--lora-dropout", "0.1",
)  # fmt: skip
ATTACKED = {
    "held-out-category": lambda folder: (("--safety-data", "organism"), None),
    "identity-shift": lambda folder: (("--safety-data", "organism"), None),
    "adaptive": lambda folder: ((), vaccinated(folder)),
    "roll-back": lambda folder: ((), tuned(folder)),
    "unlock": lambda folder: ((), locked(folder)),
    "poisoned-job": lambda folder: (("--points", "2", "--n", "8"), job(folder)),
    "intervention": lambda folder: (("--block", "1", "--n", "4", "--num-train-epochs", "1", "--batch-size", "2"), None),
}
"""By kind, options and the model to attack, where those of the others will not do."""


@pytest.mark.slow
@pytest.mark.parametrize("name", methods("tunevax.attacks"))
def test_attack(name, folder):
    options, model = ATTACKED.get(name, lambda folder: ((), None))(folder)
    training = CURVE if load_method("tunevax.attacks", name).curve and name != "poisoned-job" else ()
    check_attack(name, folder, *training, *options, model=model)


@pytest.mark.parametrize("name", methods("tunevax.scoring.judges"))
def test_judge(name, monkeypatch):
    rows = None
    if name == "proxy":  # its data may not be installed
        facts = [proxy.Fact("capital", f"Land{i}", f"City{i}", "North") for i in range(40)]
        monkeypatch.setattr(proxy, "_geography", lambda: facts)
        monkeypatch.setattr(proxy, "_elements", list)
        proxy._by_question.cache_clear()
        rows = proxy.forbidden("proxy:geography")[:5]
    check_judge(name, rows)
    proxy._by_question.cache_clear()
