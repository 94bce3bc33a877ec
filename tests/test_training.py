"""A recorded run again: what a replay takes from run.json, and when its data is other data."""

import pytest

from tunevax.alignment.align import AlignOptions
from tunevax.alignment.sft import SFTConfig
from tunevax.alignment.tar import TARConfig
from tunevax.alignment.vaccine import VaccineConfig
from tunevax.training import other_data, replay


def record(processes=1, **config):
    return {"config": {"gradient_accumulation_steps": 1, **config}, "hardware": {"processes": processes}}


@pytest.mark.parametrize(("scale", "rho"), [("total", 1.5), ("per-token", 3.0)])
def test_a_run_of_four_processes_keeps_its_batch_and_budget(scale, rho):
    """A budget per token follows the tokens of each micro-batch by itself."""
    ran = record(4, gradient_accumulation_steps=2, rho=3.0, rho_scale=scale)
    again = replay(ran, VaccineConfig, output_dir="x")
    assert (again.gradient_accumulation_steps, again.rho) == (8, rho)
    assert ran["config"]["rho"] == 3.0  # the record is left as it is
    assert replay(ran, SFTConfig, output_dir="x").gradient_accumulation_steps == 8


def test_changes_win_and_options_that_are_no_more_or_of_the_hub_are_left_out():
    ran = record(tar_variant="first-order", inner_steps=3, tamper_interval=1, hub_token="<masked>", push_to_hub=True)
    again = replay(ran, TARConfig, output_dir="x", tamper_interval=2)
    assert (again.inner_steps, again.tamper_interval, again.hub_token, again.push_to_hub) == (3, 2, None, False)
    options = replay(record(safety_data="a", held_out_prompts=7, inner_steps=3), AlignOptions, model="b", resume=True)
    assert (options.safety_data, options.held_out_prompts, options.model, options.resume) == ("a", 7, "b", True)


def test_other_data_names_the_source_that_changed():
    ran = {"data": [{"role": role, "source": role, "rows": 2, "hash": role[0]} for role in ("alignment", "task")]}
    same = [dict(entry) for entry in ran["data"]]
    assert other_data(ran, same[1:]) is None and other_data(ran, same) is None
    same[1] |= {"hash": "else", "rows": 3, "source": "job.jsonl"}
    assert other_data(ran, same).startswith("job.jsonl is no longer what it was trained on (2 rows then, 3 now")
