"""What all methods of alignment and fine-tuning have in common, and how the data that they need is asked for."""

import inspect

import pytest
from tiny import TinyTokenizer, encoded, rows, tiny_llama, tiny_lora

from tunevax.errors import UsageError
from tunevax.methods import NEEDS, load_method, methods, name_of
from tunevax.modeling.method import MethodTrainer

NAMED = [(folder, name) for folder in ("tunevax.alignment", "tunevax.finetuning") for name in methods(folder)]
ROW = {"prompt": "p", "chosen": "c", "rejected": "r", "place": "f:1"}


@pytest.mark.parametrize(("folder", "name"), NAMED)
def test_trainers_are_alike_and_know_their_name(folder, name):
    kind = load_method(folder, name)
    assert issubclass(kind, MethodTrainer) and name_of(kind) == name
    assert inspect.signature(kind.__init__) == inspect.signature(MethodTrainer.__init__)
    assert isinstance(kind.needs, frozenset) and kind.needs <= {*NEEDS}
    assert ("task" in kind.needs) == (folder == "tunevax.finetuning")


def make(folder, name, model=None, **data):
    kind = load_method(folder, name)
    return kind(model or tiny_lora(), kind.config_class("x"), processing_class=TinyTokenizer(), **data)


@pytest.mark.parametrize(
    ("folder", "name", "data", "sentence"),
    [
        ("alignment", "sft", {}, "sft needs safety rows with chosen, and there are none"),
        ("alignment", "t-vaccine", {"safety_data": [{**ROW, "rejected": None}]}, "f:1: `rejected` is missing, and t-vaccine needs it"),
        ("alignment", "tar", {"safety_data": [ROW, {**ROW, "rejected": "c"}]}, "`rejected` is `chosen` again, and tar needs two answers"),
        ("finetuning", "surgery", {"safety_data": [ROW]}, "surgery needs rows to train on"),
        ("finetuning", "lisa", {"task_data": [ROW]}, "lisa needs safety rows with chosen, and there are none"),
    ],
)  # fmt: skip
def test_data_that_is_missing_is_one_sentence_with_the_name_of_the_method(folder, name, data, sentence):
    with pytest.raises(UsageError, match=sentence):
        make(f"tunevax.{folder}", name, **data)


@pytest.mark.parametrize(
    ("folder", "name"), [("alignment", "circuit-breakers"), ("finetuning", "ldifs"), ("finetuning", "ewc")]
)
def test_a_method_that_compares_with_no_adapter_takes_none(folder, name):
    with pytest.raises(UsageError, match=f"^{name} compares with the model without its adapter, .* merge it first"):
        make(f"tunevax.{folder}", name, safety_data=[ROW], task_data=[{"prompt": "p", "completion": "c"}])


def test_answers_are_encoded_by_name_and_a_class_without_a_name_says_its_own(monkeypatch):
    encoded(monkeypatch, c=rows("safe"), r=rows("harmful"))

    class Mine(load_method("tunevax.alignment", "sft")):
        def prepare(self):
            self.seen = self.encode_answers(self.safety_data, "rejected")

    trainer = Mine(tiny_llama(2), Mine.config_class("x"), safety_data=[ROW], processing_class=TinyTokenizer())
    assert (trainer.train_dataset, trainer.seen) == (rows("safe"), rows("harmful"))
    assert name_of(Mine).endswith("Mine")


@pytest.mark.parametrize("share", ["0x1", "0o1", "1.5", "-0.1", ".nan", "al"])
def test_a_share_of_blocks_is_a_plain_number(share, tmp_path):
    with pytest.raises(UsageError, match="or a share of the frozen blocks"):
        MethodTrainer.config_class(str(tmp_path), checkpoint_blocks=share)
