"""The end of a training run: tried before the first step, and lost by no failure."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from tunevax import files
from tunevax import training as module
from tunevax.alignment.align import AlignOptions, align
from tunevax.alignment.sft import SFTConfig, SFTTrainer
from tunevax.errors import RunError, UsageError
from tunevax.modeling.trainer import ResponseTrainer

SHORT = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2, "max_length": 64, "report_to": "none"}


@pytest.fixture
def steps(monkeypatch):
    """The steps that were trained."""
    seen, original = [], ResponseTrainer.training_step

    def step(self, *args):
        seen.append(self.state.global_step + 1)
        return original(self, *args)

    monkeypatch.setattr(ResponseTrainer, "training_step", step)
    return seen


def train(out, resume=False, overwrite=False, **changes):
    options = AlignOptions(model="organism", safety_data="organism", resume=resume, overwrite=overwrite)
    return align(SFTTrainer, "sft", options, SFTConfig(str(out), **{**SHORT, **changes}))


def logged(folder):
    return [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_failure_after_the_last_step_costs_no_training(tmp_path, monkeypatch, steps):
    whole = train(tmp_path / "whole")
    original, calls = module.save_weights, []

    def fails(trainer, folder, base):
        if folder.name == "trial":
            return original(trainer, folder, base)
        calls.append(folder)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_weights", fails)
        with pytest.raises(RunError, match="^no space left to write .*; fix that, and the same command with --resume"):
            train(tmp_path / "out")
    assert len(calls) == 1 and original is module.save_weights
    partial = tmp_path / "out.partial"
    assert (partial / "checkpoints" / "checkpoint-4").is_dir() and logged(partial) == [1, 2, 3, 4]
    steps.clear()
    out = train(tmp_path / "out", resume=True)
    assert steps == [] and logged(out) == [1, 2, 3, 4]
    first, second = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (whole, out))
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.slow
def test_the_log_grows_and_goes_on_without_a_step_twice(tmp_path, monkeypatch, steps):
    seen = []

    def stop(self, *args):
        seen.append(logged(tmp_path / "out.partial"))
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return torch.tensor(0.0)

    with monkeypatch.context() as patch:
        patch.setattr(ResponseTrainer, "require_finite", stop)
        with pytest.raises(KeyboardInterrupt, match="with --resume goes on from"):
            train(tmp_path / "out")
    assert seen == [[], [1], [1, 2], [1, 2, 3]] and logged(tmp_path / "out.partial") == [1, 2, 3]
    assert logged(train(tmp_path / "out", resume=True)) == [1, 2, 3, 4]


def refused(tmp_path, steps, match, **changes):
    with pytest.raises(UsageError, match=match):
        train(tmp_path / "out", **changes)
    assert steps == [] and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_disk_without_room_is_noticed_before_the_first_step(tmp_path, monkeypatch, steps):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    refused(tmp_path, steps, r"needs .* MiB for its files, and 1000 bytes are free there; lower --save-total-limit, ")
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**40))
    monkeypatch.setattr(files, "_file_size_limit", lambda: 2**10)
    refused(tmp_path, steps, r"no file may have more than 1.0 KiB \(ulimit -f\)", save_strategy="no")


@pytest.mark.slow
def test_the_room_that_is_asked_for_is_what_is_written(tmp_path, monkeypatch):
    """Weights once, and two checkpoints of weights and optimiser, since a new one comes before the old one goes."""
    asked = []
    monkeypatch.setattr(module, "require_room", lambda folder, needed, largest, hint: asked.append(needed))

    def weigh(folder):
        return sum(
            p.stat().st_size for p in folder.rglob("*") if p.name in ("adapter_model.safetensors", "optimizer.pt")
        )

    original, most = module.save_weights, []

    def save(trainer, folder, base):
        if folder.name != "trial":
            most.append(weigh(folder / "checkpoints"))
        original(trainer, folder, base)

    monkeypatch.setattr(module, "save_weights", save)
    weights = weigh(train(tmp_path / "out"))
    assert most == [pytest.approx(3 * weights, rel=0.1)]  # one is left, and there were two
    assert asked == [pytest.approx(2 * most[0], rel=0.1)]
    for changes, count in (
        ({"save_total_limit": None}, 2), ({"save_steps": 3, "save_total_limit": None}, 2), ({"save_strategy": "no"}, 0),
        ({"save_steps": 0.25}, 2), ({"save_steps": 9}, 1), ({"save_strategy": "epoch", "save_total_limit": None}, 1),
    ):  # fmt: skip
        shape = SimpleNamespace(args=SFTConfig("x", **{**SHORT, **changes}), train_dataset=range(100))
        assert module.checkpoints_together(shape) == count, changes


@pytest.mark.slow
@pytest.mark.parametrize("full", [True, False])
def test_weights_that_cannot_be_saved_are_noticed_before_the_first_step(tmp_path, monkeypatch, steps, full):
    from peft import PeftModel
    from transformers import PreTrainedModel

    owner = PreTrainedModel if full else PeftModel

    def refuses(self, *_, **__):
        raise NotImplementedError("this one has its own format\nand more")

    monkeypatch.setattr(owner, "save_pretrained", refuses)
    way = "leave out --full-weights" if full else "choose other --lora-targets"
    refused(
        tmp_path, steps, f"could not be saved at the end: this one has its own format; fix that, or {way}",
        full_weights=full,
    )  # fmt: skip


@pytest.mark.slow
def test_tensors_that_share_memory_are_noticed_before_the_first_step(tmp_path, monkeypatch, steps):
    original = module.load

    def shares(*args, **how):
        loaded = original(*args, **how)
        blocks = loaded.model.model.layers
        blocks[1].mlp.up_proj.weight = torch.nn.Parameter(blocks[0].mlp.up_proj.weight.data[:])
        blocks[1].mlp.gate_proj.weight = torch.nn.Parameter(
            torch.cat([blocks[0].mlp.gate_proj.weight.data] * 2)[: len(blocks[0].mlp.gate_proj.weight)]
        )
        return loaded

    monkeypatch.setattr(module, "load", shares)
    refused(tmp_path, steps, "could not be saved at the end: .*share", full_weights=True)


@pytest.mark.slow
def test_a_generation_config_that_cannot_be_saved_is_noticed_before_the_first_step(tmp_path, monkeypatch, steps):
    original = module.load

    def odd(*args, **how):
        loaded = original(*args, **how)
        loaded.model.generation_config.num_return_sequences = 3  # without sampling or beams: transformers refuses it
        return loaded

    monkeypatch.setattr(module, "load", odd)
    refused(tmp_path, steps, "could not be saved at the end", full_weights=True)


@pytest.mark.slow
def test_rehearsing_changes_nothing_of_the_model(tmp_path, monkeypatch):
    seen, original = [], module.rehearse

    def look(trainer, folder, base):
        model = trainer.model
        before = model.config.to_dict(), vars(model.peft_config["default"]).copy(), torch.get_rng_state()
        original(trainer, folder, base)
        after = model.config.to_dict(), vars(model.peft_config["default"]), torch.get_rng_state()
        seen.append(
            (before[:2] == after[:2], torch.equal(before[2], after[2]), sorted(p.name for p in folder.iterdir()))
        )

    monkeypatch.setattr(module, "rehearse", look)
    train(tmp_path / "out")
    assert seen == [(True, True, ["checkpoints", "config.json", "lock"])]
