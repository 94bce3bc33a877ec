"""The controls of a hardened run, on the organism."""

import json
import shutil

import pytest

import tunevax.audit.controls as controls
from tunevax.alignment.align import AlignOptions, align
from tunevax.alignment.sft import SFTTrainer
from tunevax.alignment.t_vaccine import TVaccineTrainer
from tunevax.alignment.vaccine import VaccineTrainer
from tunevax.audit.controls import make_controls
from tunevax.data import load_safety
from tunevax.errors import UsageError
from tunevax.organism import path
from tunevax.records import data_entry, read_run

ALL = ("undefended", "equal-compute", "random-perturbation")
OPTIONS = {"per_device_train_batch_size": 4, "max_length": 64, "learning_rate": 2e-3, "seed": 7, "lora_r": 4}


@pytest.fixture
def safety(tmp_path):
    """A safety file of 16 rows in two categories."""
    file = tmp_path / "pairs.jsonl"
    rows = [{**r, "split": "alignment", "category": "ab"[i % 2]} for i, r in enumerate(load_safety("organism")[:16])]
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return file


def harden(trainer, method, out, safety="organism", model="organism", template=None, **options):
    data = AlignOptions(model=model, safety_data=str(safety), task_data="organism", chat_template=template)
    return align(trainer, method, data, trainer.config_class(str(out), **{**OPTIONS, **options}))


def weights(run):
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.slow
def test_controls_of_t_vaccine(tmp_path, safety, monkeypatch):
    # No max_steps: an epoch of 16 safe and 16 benign rows is 8 steps, a schedule that a control must not fall back to.
    options = {"layer_sampling": "2,5", "rho": 1.0, "num_train_epochs": 0.75}
    # Names that mean nothing in another working directory, and a template that is gone later.
    shutil.copytree(path(), tmp_path / "base")
    template = tmp_path / "own.jinja"
    template.write_text((path() / "chat_template.jinja").read_text() + "{# own #}")
    monkeypatch.chdir(tmp_path)
    run = harden(TVaccineTrainer, "t-vaccine", tmp_path / "tv", safety, "base", "own.jinja", **options)
    template.unlink()
    monkeypatch.chdir("/")
    record = read_run(run)
    assert record["steps"] == 6 and record["compute"] == {"per_step": 1.625, "total": 9.75}
    assert record["data"][0]["categories"] == ["a", "b"] and "categories" not in record["data"][1]
    none, compute, random = make_controls(run, ALL, tmp_path / "controls", "why not")
    assert none[:2] == ("undefended", str(tmp_path / "base"))
    assert [c.label for c in (compute, random)] == ["tv-compute", "tv-random"]
    plain, noisy = read_run(compute.ref), read_run(random.ref)
    assert (plain["method"], plain["steps"], plain["compute"]["total"]) == ("sft", 10, 10.0)
    assert (noisy["method"], noisy["steps"], noisy["compute"]["per_step"]) == ("t-vaccine", 6, (1 + 0.75) / 2)
    for control in (plain, noisy):
        assert control["data"] == record["data"] and control["model"]["hash"] == record["model"]["hash"]
        assert control["template_hash"] == record["template_hash"] and control["command"] == "why not"
    changed = {k for k, v in noisy["config"].items() if record["config"][k] != v}
    assert changed == {"model", "chat_template", "perturbation", "max_steps"}
    changed = {k for k, v in plain["config"].items() if record["config"][k] != v}
    assert changed == {"model", "chat_template", "max_steps"}
    # A second call trains nothing; another setting under the same name is refused.
    with monkeypatch.context() as patch:
        patch.setattr(controls, "align", lambda *_: pytest.fail("trained again"))
        assert make_controls(run, ALL, tmp_path / "controls") == [none, compute, random]
    file = tmp_path / "controls" / "tv-compute" / "run.json"
    file.write_text(json.dumps({**plain, "config": {**plain["config"], "learning_rate": 0.5}}))
    with pytest.raises(UsageError, match=r"learning_rate is 0\.5, not 0\.002"):
        make_controls(run, ["equal-compute"], tmp_path / "controls")
    # Other rows, in the same number, are noticed before anything is trained; so is a file that is gone.
    safety.write_text(safety.read_text().replace('"category": "a"', '"category": "c"', 1))
    with pytest.raises(UsageError, match=r"tv cannot be run again: .*pairs\.jsonl is no longer what it was trained on"):
        make_controls(run, ["equal-compute"], tmp_path / "new")
    with (tmp_path / "base" / "model.safetensors").open("ab") as file:
        file.write(b"other")
    with pytest.raises(UsageError, match="base has other weights than when"):
        make_controls(run, ["undefended"], tmp_path / "new")
    shutil.copytree(path(), tmp_path / "base", dirs_exist_ok=True)
    safety.unlink()
    with pytest.raises(UsageError, match=r"cannot be read any more: no such file: .*pairs\.jsonl"):
        make_controls(run, ["random-perturbation"], tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_random_vaccine_resumes_to_the_same_weights(tmp_path, monkeypatch):
    run = harden(VaccineTrainer, "vaccine", tmp_path / "v", max_steps=6, save_steps=2, lora_dropout=0.1,
                 gradient_accumulation_steps=2)  # fmt: skip
    assert read_run(run)["compute"] == {"per_step": 2.0, "total": 12.0}
    kind = ["random-perturbation"]
    (whole,) = make_controls(run, kind, tmp_path / "whole")
    step = VaccineTrainer.training_step

    def stops(self, *args):
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return step(self, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(VaccineTrainer, "training_step", stops)
        make_controls(run, kind, tmp_path / "cut")
    (cut,) = make_controls(run, kind, tmp_path / "cut")
    assert read_run(cut.ref)["resumed"]
    assert weights(tmp_path / "cut" / "v-random") == weights(tmp_path / "whole" / "v-random") != weights(run)
    assert whole.why == cut.why == "v with a random perturbation of the same size"


@pytest.mark.slow
def test_a_resumed_run_knows_its_whole_cost(tmp_path, monkeypatch):
    options = {"gamma": 2, "layer_sampling": "inverse", "probe_interval": 3, "max_steps": 6, "save_steps": 2}
    run = harden(TVaccineTrainer, "t-vaccine", tmp_path / "whole", **options)
    select = TVaccineTrainer.select

    def stops(self):
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        select(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TVaccineTrainer, "select", stops)
        harden(TVaccineTrainer, "t-vaccine", tmp_path / "cut", **options)
    data = AlignOptions(model="organism", safety_data="organism", task_data="organism", resume=True)
    cut = align(
        TVaccineTrainer, "t-vaccine", data, TVaccineTrainer.config_class(str(tmp_path / "cut"), **OPTIONS, **options)
    )
    lowest = [min(json.loads(line)["selected"]) for line in (cut / "log.jsonl").read_text().splitlines()]
    expected = sum((1 + 3 * (1 - m / 8)) / 2 for m in lowest) + 2 * 8 / 4  # two probes of 8 rows, batch 4
    assert read_run(cut)["compute"] == read_run(run)["compute"]
    assert read_run(cut)["compute"]["total"] == pytest.approx(expected) and len(set(lowest)) > 1


@pytest.mark.slow
def test_what_has_no_control_says_why(tmp_path):
    run = harden(SFTTrainer, "sft", tmp_path / "plain", max_steps=1, warmup_steps=0)  # one step that trains
    none, compute, random = make_controls(run, ALL, tmp_path / "controls")
    assert (none.ref, compute.ref, random.ref) == ("organism", None, None)
    assert compute.why == "plain is itself plain fine-tuning" and random.why == "sft does not perturb"
    with pytest.raises(UsageError, match="did you mean 'equal-compute'"):
        make_controls(run, ["equal-computes"], tmp_path)
    for other in ("organism", tmp_path):
        with pytest.raises(UsageError, match="is not a run of tunevax align"):
            make_controls(other, ["undefended"], tmp_path)
    # Hardened twice; then the model below is gone.
    data = AlignOptions(model=str(run), safety_data="organism")
    top = align(SFTTrainer, "sft", data, SFTTrainer.config_class(str(tmp_path / "top"), **OPTIONS, max_steps=1))
    assert make_controls(top, ["undefended"], tmp_path)[0].ref == str(run)
    shutil.rmtree(run)
    with pytest.raises(UsageError, match="plain, which .*top was hardened from, is gone"):
        make_controls(top, ["undefended"], tmp_path)
    file = top / "run.json"
    record = {k: v for k, v in json.loads(file.read_text()).items() if k != "compute"}
    file.write_text(json.dumps({**record, "method": "vaccine"}))
    with pytest.raises(UsageError, match="does not say what it cost"):
        make_controls(top, ["equal-compute"], tmp_path)


def test_only_alignment_data_records_its_categories():
    rows = [{"prompt": p, "category": c} for p, c in (("x", "b"), ("y", "a"), ("z", "b"), ("w", None))]
    assert data_entry("alignment", "s", rows)["categories"] == ["a", "b"]
    assert data_entry("alignment", "s", rows[3:])["categories"] is None
    assert "categories" not in data_entry("attack", "s", rows)
