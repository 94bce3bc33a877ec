"""YAML as people write it: words are words, numbers are numbers."""

import json
import math

import pytest

from tunevax.audit.protocol import load_protocol
from tunevax.cli import main
from tunevax.cli.options import parse
from tunevax.errors import UsageError
from tunevax.finetuning.finetune import FinetuneOptions
from tunevax.finetuning.sft import JobConfig
from tunevax.yaml_files import read_yaml


def options(tmp_path, text, *more):
    (tmp_path / "o.yaml").write_text(text, encoding="utf-8")
    arguments = ["--config", str(tmp_path / "o.yaml"), "--output-dir", str(tmp_path / "out"), *more]
    data, training = parse("t", [FinetuneOptions, JobConfig], arguments)
    return {**vars(training), **vars(data)}


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("screen: off", "screen", "off"), ("screen: no", "screen", "off"), ("screen: false", "screen", "off"),
        ("save_strategy: no", "save_strategy", "no"), ("save-strategy: off", "save_strategy", "no"),
        ("save_strategy: False", "save_strategy", "no"), ("bf16: on\nuse_cpu: on", "use_cpu", True),
        ("full_weights: yes", "full_weights", True), ("full_weights: off", "full_weights", False),
        ("full_weights: no", "full_weights", False), ("full_weights: TRUE", "full_weights", True),
        ("learning_rate: 1e-4", "learning_rate", 1e-4), ("learning_rate: 1E-4", "learning_rate", 1e-4),
        ("learning_rate: 3", "learning_rate", 3.0), ("max_grad_norm: .5", "max_grad_norm", 0.5),
        ("max_steps: 1_000", "max_steps", 1000), ("max_steps: 1e3", "max_steps", 1000),
        ("max_steps: 010", "max_steps", 10), ("max_steps: 0x10", "max_steps", 16), ("max_steps: 0o10", "max_steps", 8),
        ("revision: 1.10", "revision", "1.10"), ("revision: 0123456", "revision", "0123456"),
        ("revision: 2024-01-01", "revision", "2024-01-01"), ("revision: 12:30", "revision", "12:30"),
        ("revision: 1_000", "revision", "1_000"), ("revision: null", "revision", None), ("revision:", "revision", None),
        ("revision: --x", "revision", "--x"), ("run_name: on", "run_name", "on"), ("lora_targets: yes", "lora_targets", "yes"),
        ("weight_decay: -1e-4", "weight_decay", -1e-4),
        ("lr_scheduler_kwargs: {min_lr: 1e-6}\nlr_scheduler_type: cosine_with_min_lr", "lr_scheduler_kwargs", {"min_lr": 1e-6}),
        ("\ufeffmax_steps: 3", "max_steps", 3),
    ],
)  # fmt: skip
def test_values_of_a_config_file_mean_what_they_say(tmp_path, line, name, value):
    found = options(tmp_path, line)[name]
    found = getattr(found, "value", found)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_steps: 1.5", "--max-steps takes a whole number, not '1.5'"), ("learning_rate: fast", "--learning-rate takes a number, not 'fast'"),
        ("full_weights: maybe", "Truthy value expected"), ("max_steps: 1\nmax_steps: 2", "o.yaml:2: the key 'max_steps' is there twice"),
        ("max_steps: [", "o.yaml:1: not valid YAML"), ("- a", "must hold `option: value` lines"),
        ("save_total_limit: null", "save_total_limit has no value"), ("screen: on", "unknown screen 'on'"),
    ],
)  # fmt: skip
def test_values_that_mean_nothing_are_named(tmp_path, text, message):
    with pytest.raises(UsageError) as refused:
        options(tmp_path, text)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_files_that_cannot_be_read_are_named(tmp_path, capsys):
    (tmp_path / "latin.yaml").write_bytes(b"a: 1\nb: caf\xe9\n")
    for path, message in (
        (tmp_path / "latin.yaml", "latin.yaml:2: not UTF-8"),
        (tmp_path / "no.yaml", "no such file"),
        (tmp_path, "Is a directory"),
    ):
        for verb in (["finetune", "sft"], ["audit"]):
            option = "--config" if verb[0] == "finetune" else "--protocol"
            assert main([*verb, option, str(path), "--output-dir", str(tmp_path / "out")]) == 2
            error = capsys.readouterr().err
            assert error.count("\n") == 1 and (message in error or option == "--protocol"), error


def test_a_protocol_means_what_it_says(tmp_path):
    file = tmp_path / "p.yaml"
    text = """
phi: 5e-1
weak: yes
screen: off
seeds: [1, 2]
scoring: {limit: 1_0, max_new_tokens: 8, engine: null}
defaults: {save_strategy: no}
attacks:
  - {kind: finetune, learning_rate: [1e-4, 1e-3], n: 1_0, p: .5, max_steps: 1e1, lr_scheduler_type: constant, bf16: off}
  - {kind: template, template: no}
"""
    file.write_text(text)
    protocol = load_protocol(str(file))
    assert (protocol.phi, protocol.weak, protocol.screen) == (0.5, True, 0) and protocol.screen is not False
    assert (protocol.scoring["limit"], protocol.scoring["max_new_tokens"]) == (10, 8)
    from tunevax.audit.protocol import settings

    first, second, last = settings(protocol, 2, ())
    assert [s.values["learning_rate"] for s in (first, second)] == [1e-4, 1e-3]
    expected = {"n": 10, "p": 0.5, "max_steps": 10, "bf16": False, "save_strategy": "no"}
    assert {k: first.values[k] for k in expected} == expected and last.values["template"] == "no"
    json.dumps(protocol.attacks)
    for line, message in (("screen: off", "screen: on"), ("weak: yes", "weak: maybe")):
        file.write_text(text.replace(line, message))
        with pytest.raises(
            UsageError, match=f"{message.partition(':')[0]} is '{message.rpartition(' ')[2]}'; it must be"
        ):
            load_protocol(str(file))


def test_special_numbers(tmp_path):
    (tmp_path / "n.yaml").write_text("[.inf, -.inf, .nan, +1, 1., -0o7, ~, '1', 1__0]")
    found = read_yaml(tmp_path / "n.yaml")
    assert found[:2] == [math.inf, -math.inf] and math.isnan(found[2]) and found[3:5] == [1, 1.0]
    assert found[5:] == ["-0o7", None, "1", "1__0"]
