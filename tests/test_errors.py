"""The sentences about an option that is out of bounds."""

from types import SimpleNamespace

import pytest

from tunevax.errors import UsageError, require, require_one_of

WRONG = [
    ({"at_least": 1}, 0, "x is 0; it must be at least 1"),
    ({"at_least": 0}, -1.0, "x is -1.0; it must be a finite number, 0 or more"),
    ({"at_least": 0}, float("inf"), "x is inf; it must be a finite number, 0 or more"),
    ({"above": 0}, 0.0, "x is 0.0; it must be a finite number above 0"),
    ({"at_least": 0, "at_most": 1}, 1.5, "x is 1.5; it must be between 0 and 1"),
    ({"at_least": 0, "below": 1}, 1.0, "x is 1.0; it must be at least 0 and below 1"),
    ({"above": 0, "at_most": 1}, float("nan"), "x is nan; it must be above 0 and at most 1"),
    ({"at_least": 1, "meaning": "the number of y"}, 0, "x, the number of y, is 0; it must be at least 1"),
]


@pytest.mark.parametrize(("bounds", "value", "sentence"), WRONG)
def test_out_of_bounds_is_one_sentence(bounds, value, sentence):
    with pytest.raises(UsageError) as error:
        require(SimpleNamespace(a=1 if "at_most" not in bounds else 0.5, x=value), "x", **bounds)
    assert str(error.value) == sentence


def test_inside_the_bounds_and_none_pass():
    options = SimpleNamespace(x=1, y=0.0, z=None)
    require(options, "x", "z", at_least=1)
    require(options, "x", "y", at_least=0, at_most=1)
    require(options, "y", at_least=0, below=1)
    with pytest.raises(UsageError, match="^y is 0.0"):
        require(options, "x", "y", above=0)


def test_one_of_the_known_values():
    options = SimpleNamespace(mode="mixx", form="a")
    require_one_of(options, form=("a", "b"))
    with pytest.raises(UsageError, match="unknown mode 'mixx'; did you mean 'mix'"):
        require_one_of(options, form=("a", "b"), mode=("mix", "joint"))
