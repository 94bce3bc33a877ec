"""The contract over everything that tunevax brings by name: one list of names, one check for each kind."""

import pytest

from tunevax.methods import methods
from tunevax.testing import check_aligner, check_finetuner

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


@pytest.mark.parametrize("name", methods("tunevax.alignment"))
def test_aligner(name, folder):
    check_aligner(name, folder, *FEW_STEPS.get(name, ()))


@pytest.mark.parametrize("name", methods("tunevax.finetuning"))
def test_finetuner(name, folder):
    check_finetuner(name, folder, *FEW_STEPS.get(name, ()))
