"""The contract of everything that is known by a name: what a method, an attack, a judge and a selector keep to, for
tunevax's own and for those of other packages.

    from tunevax.testing import check_aligner

    def test_my_method(tmp_path):
        check_aligner("my-method", tmp_path, "--my-interval", "2")

A check runs commands of tunevax in this process, on the first blocks of the organism and a few of its rows, and raises
an AssertionError that says what does not hold. Checks that share a folder share the model, the data and the plain run.
"""

from __future__ import annotations

import dataclasses
import io
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tunevax.methods import load_method
from tunevax.records import RunRecord, read_lines, read_run

BLOCKS = 3
"""Of the organism, in the model that the checks run on."""
STEPS, SAVED, KILLED = 4, 2, 3
"""Steps of a training, the step whose checkpoint a resumed one continues from, and the step it was killed at."""
TRAINING = (
    "--max-steps", f"{STEPS}", "--save-steps", f"{SAVED}", "--per-device-train-batch-size", "2",
    "--gradient-accumulation-steps", "2", "--lora-dropout", "0.1", "--warmup-steps", "0", "--learning-rate", "2e-3",
    "--max-length", "48",
)  # fmt: skip
"""Two micro-batches a step, and dropout, so that a number taken from a shared generator shows."""


def check_aligner(name: str, folder: Path, *options: str) -> None:
    """Check an alignment method: its options, a run, the same run resumed, its plan, and that its knob turns it off.

    Args:
        name: on the command line.
        folder: to write into.
        options: for the method, as on the command line, such as `"--gamma", "2"`: what a run of four steps needs.
    """
    method = load_method("tunevax.alignment", name)
    needs = ("chosen", "rejected") if method.needs_rejected else ("chosen",)
    data = ("--safety-data", safety_rows(folder, needs), "--task-data", task_rows(folder), "--held-out-prompts", "0")
    _check_trainer("align", name, method, folder, data, options)


def check_finetuner(name: str, folder: Path, *options: str) -> None:
    """Check a method of fine-tuning; as `check_aligner`."""
    method = load_method("tunevax.finetuning", name)
    safety = ("--safety-data", safety_rows(folder, method.needs)) if method.needs else ()
    _check_trainer("finetune", name, method, folder, ("--task-data", task_rows(folder), *safety), options)


def _check_trainer(
    verb: str, name: str, method: Any, folder: Path, data: Sequence[str], options: Sequence[str]
) -> None:
    arguments = [verb, name, "--model", small_model(folder), *data, *TRAINING]
    _check_options(arguments, method.config_class, folder)
    whole = _run(folder / f"{verb}-{name}", *arguments, *options)
    record = _check_run(whole, "log.jsonl", "prompts.json", *_weights(whole))
    missing = [key for key in ("steps", "final_loss", "compute", "template_hash", "model") if key not in record]
    assert not missing, f"run.json of {name} has no {', '.join(missing)}"
    assert record["steps"] == STEPS, f"{name} took {record['steps']} steps where {STEPS} were asked for"
    _check_resumed(whole, arguments, options)
    _check_off(verb, name, method, whole, arguments, options)
    _check_plan(name, folder, options)


def _check_options(arguments: Sequence[str], config_class: type, folder: Path) -> None:
    """Every option has help, and what cannot be an option, or a value of one, is refused in a sentence."""
    from transformers import TrainingArguments

    from tunevax.modeling.trainer import TrainConfig

    verb, name, *_ = arguments
    fields = [f for f in dataclasses.fields(config_class) if f.name not in _names(TrainingArguments) | {"output_dir"}]
    silent = [f.name for f in fields if not f.metadata.get("help")]
    assert not silent, f"{verb} {name} has no help for {', '.join(silent)}; give the field metadata={{'help': ...}}"
    out = str(folder / "refused")
    assert "--no-such-option" in refused(*arguments, "--output-dir", out, "--no-such-option", "1")
    for field in fields:
        if field.name in _names(TrainConfig) or not any(kind in str(field.type) for kind in ("int", "float")):
            continue
        text = refused(*arguments, "--output-dir", out, f"--{field.name}", "nan")
        assert field.name.replace("_", "-") in text.replace("_", "-"), f"{text!r} does not name {field.name}"


def _check_run(out: Path, *files: str) -> RunRecord:
    """A run folder is whole: its files are there and none is left over, and run.json says what was run."""
    missing = [file for file in ("README.md", *files) if not (out / file).is_file()]
    assert not missing, f"{out} has no {', '.join(missing)}"
    left = [path.name for path in out.parent.glob(f"{out.name}.*")] + [p.name for p in out.glob("checkpoint*")]
    assert not left, f"a finished run left {', '.join(left)}"
    record = read_run(out)
    keys = ("schema", "verb", "method", "paper", "command", "seed", "config", "data", "versions", "hardware", "started")
    missing = [key for key in keys if key not in record]
    assert not missing, f"run.json of {out.name} has no {', '.join(missing)}"
    if record.get("adapter"):
        from tunevax.modeling.loading import load

        loaded = load(str(out))
        assert loaded.tokenizer.chat_template, f"{out} loads without a chat template"
    return record


def _check_resumed(whole: Path, arguments: Sequence[str], options: Sequence[str]) -> None:
    """A run that is killed and resumed ends in the same weights and the same log, bit for bit."""
    what, cut = " ".join(arguments[:2]), whole.with_name(f"{whole.name}-killed")
    command = [*arguments, *options, "--output-dir", str(cut)]
    with killed_at(KILLED):
        run(*command, code=130)
    partial = cut.with_name(f"{cut.name}.partial")
    assert list(partial.rglob(f"checkpoint-{SAVED}")), f"{what} killed at step {KILLED} left no checkpoint to resume"
    run(*command, "--resume")
    assert read_run(cut).get("resumed"), f"{what} --resume started again"
    (file, *_) = _weights(whole)
    same = (whole / file).read_bytes() == (cut / file).read_bytes()
    assert same, f"{what} killed and resumed has other weights than a run in one go; see `method_state`"
    same = read_lines(whole / "log.jsonl") == read_lines(cut / "log.jsonl")
    assert same, f"{what} killed and resumed has another log than a run in one go; see `method_state`"
    assert read_run(cut)["compute"] == read_run(whole)["compute"], f"{what} forgets its cost when it is resumed"


def _check_off(
    verb: str, name: str, method: Any, whole: Path, arguments: Sequence[str], options: Sequence[str]
) -> None:
    """With the options of `method.off` it trains what plain SFT trains, bit for bit, and without them it does not."""
    if name == "sft":
        return
    (file, *_) = _weights(whole)
    full = ["--full-weights"] if file.startswith("model") else []
    plain = _run(whole.with_name("-".join([verb, "sft", *full])), verb, "sft", *arguments[2:], *full)

    def same(out: Path) -> bool:
        return (plain / file).read_bytes() == (out / file).read_bytes()

    assert not same(whole), f"{name} trains what sft trains, though it is not off"
    if method.off is None:
        return
    knobs = [token for option, value in method.off.items() for token in (f"--{option}", str(value))]
    off = _run(whole.with_name(f"{whole.name}-off"), *arguments, *options, *knobs)
    assert same(off), f"{name} {' '.join(knobs)} does not train what sft trains; mend it, or set `off`"


def _check_plan(name: str, folder: Path, options: Sequence[str]) -> None:
    """`tunevax plan` predicts memory for it."""
    model = ("--model", small_model(folder), "--device", "cpu", "--max-length", "32")
    text = run("plan", "--method", name, *model, "--format", "json", *options)
    needs = json.loads(text)["needs"]
    assert needs["peak"] > 0 and needs["kinds"].get("weights"), f"the plan of {name} names no memory"


# --- commands --------------------------------------------------------------------------------------------------------


def run(*arguments: str, code: int = 0) -> str:
    """Run a command in this process; returns what it printed, on stderr if `code` is not 0."""
    from tunevax.cli import main

    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        exit_code = main(list(arguments))
    command = shlex.join(["tunevax", *arguments])
    assert exit_code == code, f"exit code {exit_code}, not {code}, of {command}: {err.getvalue().strip()[-500:]}"
    return (err if code else out).getvalue()


def refused(*arguments: str) -> str:
    """Run a command that must be refused; returns its one sentence."""
    text = run(*arguments, code=2)
    lines = text.strip().splitlines()
    one = len(lines) == 1 and lines[0].startswith("tunevax: ") and "--debug" not in text
    assert one, f"not one sentence but {text!r}, of {shlex.join(['tunevax', *arguments])}"
    return text


def _run(out: Path, *arguments: str) -> Path:
    """The run folder of a command, which is run if it is not there."""
    if not (out / "run.json").is_file():
        run(*arguments, "--output-dir", str(out))
    return out


@contextmanager
def killed_at(step: int) -> Iterator[None]:
    """Inside, a training is interrupted before it takes this step, counted from 0."""
    from transformers.trainer_callback import CallbackHandler

    begin = CallbackHandler.on_step_begin

    def stop(self: Any, args: Any, state: Any, control: Any) -> Any:
        if state.global_step == step:
            raise KeyboardInterrupt
        return begin(self, args, state, control)

    with patch.object(CallbackHandler, "on_step_begin", stop):
        yield


def _weights(out: Path) -> list[str]:
    """The files of a run's weights, relative to it, first the weights themselves."""
    place = read_run(out).get("adapter")
    assert place in ("adapter", "model"), f"run.json of {out.name} says in `adapter` neither adapter nor model"
    first = "adapter_model" if place == "adapter" else "model"
    return [f"{place}/{file}" for file in (f"{first}.safetensors", "tokenizer.json", "chat_template.jinja")]


def _names(config_class: type) -> set[str]:
    return {field.name for field in dataclasses.fields(config_class)}


# --- model and data --------------------------------------------------------------------------------------------------


def small_model(folder: Path) -> str:
    """A model folder: the organism's first blocks, with its tokenizer and chat template."""
    out = folder / "small"
    if not out.is_dir():
        from tunevax.modeling.loading import load

        loaded = load("organism")
        loaded.model.model.layers = loaded.model.model.layers[:BLOCKS]
        loaded.model.config.num_hidden_layers = BLOCKS
        loaded.model.save_pretrained(out)
        loaded.tokenizer.save_pretrained(out)
    return str(out)


def safety_rows(folder: Path, answers: Sequence[str] = ("chosen", "rejected"), each: int = 20) -> str:
    """A file of rows of each split of the organism's safety data, with these answers and no others."""
    from tunevax.organism import World

    file = folder / f"safety-{'-'.join(answers)}.jsonl"
    rows = [{**row, "split": s} for s in ("alignment", "attack", "evaluation") for row in World().safety(s)[:each]]
    return _written(file, [{k: row[k] for k in ("prompt", "category", "split", *answers)} for row in rows])


def task_rows(folder: Path) -> str:
    """A file of rows of the organism's benign task."""
    from tunevax.organism import World

    rows = {"train": World().benign("mix")[:20], "evaluation": World().benign("evaluation")[:8]}
    lines = [{"prompt": r["prompt"], "completion": r["completion"], "split": s} for s in rows for r in rows[s]]
    return _written(folder / "task.jsonl", lines)


def _written(file: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(file)
