"""The contract of everything that is known by a name: what a method, an attack, a judge and a selector keep to, for
tunevax's own and for those of other packages.

    from tunevax.testing import check_aligner

    def test_my_method(tmp_path):
        check_aligner("my-method", tmp_path, "--my-interval", "2")

A check runs commands of tunevax in this process, on the first blocks of the organism and a few of its rows, and raises
an AssertionError that says what does not hold. Checks that share a folder share the model, the data and the plain run.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import math
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tunevax.data.roles import load_rows
from tunevax.methods import load_method
from tunevax.planning.plan import models_held
from tunevax.records import HARMFUL, RunRecord, read_lines, read_run

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

ROW = (
    "schema", "model", "role", "kind", "traits", "attack", "attack_hash", "settings", "seed", "step", "samples",
    "train_loss", "scores",
)  # fmt: skip
"""What every row of an attack's results has."""


def check_aligner(name: str, folder: Path, *options: str) -> None:
    """Check an alignment method: its options, a run, the same run resumed, its plan, and that its knob turns it off.

    Args:
        name: on the command line.
        folder: to write into.
        options: for the method, as on the command line, such as `"--gamma", "2"`: what a run of four steps needs.
    """
    method = load_method("tunevax.alignment", name)
    needs = [answer for answer in ("chosen", "rejected") if answer in method.needs]
    data = ("--safety-data", safety_rows(folder, needs), "--task-data", task_rows(folder), "--held-out-prompts", "0")
    _check_trainer("align", name, method, folder, data, options)


def check_finetuner(name: str, folder: Path, *options: str) -> None:
    """Check a method of fine-tuning; as `check_aligner`."""
    method = load_method("tunevax.finetuning", name)
    needs = [answer for answer in ("chosen", "rejected") if answer in method.needs]
    safety = ("--safety-data", safety_rows(folder, needs)) if needs else ()
    _check_trainer("finetune", name, method, folder, ("--task-data", task_rows(folder), *safety), options)


def check_restorer(name: str, folder: Path, *options: str, model: str | None = None) -> None:
    """Check a method of restoration: its options, a run that is the same when it is repeated, and its plan.

    Args:
        name: on the command line.
        folder: to write into.
        options: for the command, such as `"--safety-data", safety_rows(folder)`.
        model: to restore; default the small model. A run that a method starts from is made by `tuned`.
    """
    method = load_method("tunevax.restoration", name)
    arguments = ["restore", name, "--model", model or small_model(folder), *options]
    _check_options(arguments, method, folder)
    first, second = (_run(folder / f"restore-{name}{again}", *arguments) for again in ("", "-again"))
    _check_run(first)
    for file in (path.relative_to(first) for path in first.rglob("*") if path.is_file()):
        same = file.name in ("run.json", "README.md") or (first / file).read_bytes() == (second / file).read_bytes()
        assert same, f"{file} of {name} differs when the same command is repeated"
    _check_plan(name, method, folder)


def check_selector(name: str, folder: Path, *options: str, any_order: bool = True) -> None:
    """Check a selector: its options, a run, its plan, a score for each row, and that it leaves the rows alone.

    Args:
        any_order: a row's score does not depend on the rows before it. False for one that trains on them or draws
            numbers for them: then the same rows must have the same scores again.
    """
    from tunevax.curation.curate import CurateOptions, Pool, scored
    from tunevax.data.safety import load_safety

    method = load_method("tunevax.curation", name)
    safety, trusted = safety_rows(folder), validation_rows(folder)
    model = small_model(folder) if "model" in method.needs else None
    sources = {"--model": model, "--safety-data": safety, "--validation-data": trusted}
    arguments = ["curate", name, "--keep", "0.5", *(t for pair in sources.items() if pair[1] for t in pair)]
    _check_options(arguments, method, folder)
    out = _run(folder / f"curate-{name}", *arguments, *options)
    kept, rows = _check_run(out, "data.jsonl", "scores.jsonl")["kept"], read_lines(out / "scores.jsonl")
    assert len(read_lines(out / "data.jsonl")) == kept == sum(row["kept"] for row in rows) == len(rows) // 2
    data, validation = load_safety(safety, "alignment"), load_rows("validation", trusted, ("chosen",), name)
    data = data[::-1] if any_order else data
    pool = Pool(data, validation, CurateOptions(model=model), model, folder / f"pool-{name}")
    before = copy.deepcopy((data, validation))
    scores = scored(_config(method, folder, options), pool)
    assert (pool.rows, pool.validation) == before, f"{name} changes the rows that it is given"
    by_prompt = {row["prompt"]: row["score"] for row in rows}
    for row, score in zip(data, scores, strict=True):
        same = math.isclose(score, by_prompt[row["prompt"]], rel_tol=1e-4, abs_tol=1e-5)
        how = "in another order" if any_order else "again"
        assert same, f"{name} gives {row['prompt']!r} {score} where the rows come {how}, and {by_prompt[row['prompt']]}"
    _check_plan(name, method, folder)


def check_attack(name: str, folder: Path, *options: str, model: str | None = None) -> None:
    """Check an attack: its options, its rows, what it needs, and that model and control are attacked alike.

    The control is a copy of the model, so their rows must be equal, and a second attack by the same seed is the first.

    Args:
        name: on the command line.
        folder: to write into.
        options: for the command, such as `"--max-steps", "4"`.
        model: what it applies to, where that is not any model: a run folder. Then a plain model must be refused.
    """
    kind = load_method("tunevax.attacks", name)
    plain = [
        "attack",
        name,
        "--eval-data",
        f"{safety_rows(folder)}:split=evaluation",
        "--judges",
        "organism",
        "--limit",
        "4",
    ]
    plain += ["--max-new-tokens", "8", "--model"]
    ref = model or small_model(folder)
    twin = folder / f"{Path(ref).name}-twin"
    if not twin.exists():
        shutil.copytree(ref, twin)
    config = _config(kind, folder, options)
    needs = {"--safety-data": ("harmful", safety_rows(folder)), "--task-data": ("task", task_rows(folder))}
    given = {option: file for option, (need, file) in needs.items() if need in config.needs and option not in options}
    arguments = [*plain, ref, "--control", str(twin), *options]
    whole = [*arguments, *(token for pair in given.items() for token in pair)]
    _check_options(whole, kind, folder)
    for option in () if model else given:
        rest = [token for pair in given.items() if pair[0] != option for token in pair]
        text = refused(*arguments, *rest, "--output-dir", str(folder / "refused"))
        assert option in text, f"{name} needs {option} and says, without it: {text!r}"
    if model:
        alone = [*plain, small_model(folder), "--control", "none", *whole[len(plain) + 3 :]]
        refused(*alone, "--output-dir", str(folder / "refused"))
    out = _run(folder / f"attack-{name}", *whole)
    _check_run(out, "results.jsonl", "generations.jsonl")
    rows, generations = read_lines(out / "results.jsonl"), read_lines(out / "generations.jsonl")
    for row in rows:
        missing = [key for key in ROW if key not in row]
        assert not missing, f"a row of {name} has no {', '.join(missing)}"
        assert (row["kind"], row["traits"], row["seed"]) == (name, config.traits, config.seed), (
            f"{name} is not in {row}"
        )
        assert any(score.startswith(HARMFUL) for score in row["scores"]), f"a row of {name} has no harmful score"
    ours, theirs = ([_of(row) for row in rows if row["role"] == role] for role in ("model", "control"))
    assert ours, f"{name} scored nothing"
    assert ours == theirs, f"{name} has other rows for a copy of the model than for the model"
    labels = {row["role"]: row["model"] for row in rows}
    ours, theirs = ([_of(g) for g in generations if g["model"] == labels[role]] for role in ("model", "control"))
    assert ours and ours == theirs, f"{name} has other responses for a copy of the model than for the model"
    steps = [row["step"] for row in rows if row["role"] == "model"]
    assert steps == sorted(set(steps)), f"the steps of {name} are {steps}"
    assert not kind.curve or (steps[0] == 0 and len(steps) > 1), f"{name} is a curve of {steps}, and begins at step 0"
    other = dataclasses.replace(config, seed=config.seed + 1)
    hashes = {each.setting_hash(name, [], {"hash": ""}) for each in (config, other)}
    assert len(hashes) == 1, f"the setting of {name} has another hash with another seed"


def _of(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row but for whose it is."""
    return {key: value for key, value in row.items() if key not in ("model", "role")}


def check_judge(name: str) -> None:
    """Check a judge: a verdict for each response, in order, whatever else is in the batch, and the same again."""
    from tunevax.organism import World
    from tunevax.scoring.judges import Verdict, load_judges

    judge = load_judges([name])[name]
    rows = World().safety("evaluation")[:5]
    pairs = [(row["prompt"], row[answer]) for row in rows for answer in ("chosen", "rejected")]
    pairs += [(rows[0]["prompt"], text) for text in ("", " ", "use use use use", "\u2028 {} <think>")]

    def verdicts(pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        return judge([prompt for prompt, _ in pairs], [response for _, response in pairs])

    whole = verdicts(pairs)
    assert verdicts([]) == [], f"{name} has verdicts on no responses"
    assert len(whole) == len(pairs), f"{name} has {len(whole)} verdicts on {len(pairs)} responses"
    for verdict in whole:
        right = isinstance(verdict, Verdict) and verdict.verdict and isinstance(verdict.harmful, bool)
        assert right and (verdict.score is None or 0 <= verdict.score <= 1), f"{name} gives {verdict!r}"
    assert verdicts(pairs) == whole, f"{name} changes its mind when it is asked again"
    assert verdicts(pairs[::-1]) == whole[::-1], f"the verdicts of {name} are not in the order of the responses"
    alone = [verdict for pair in pairs for verdict in verdicts([pair])]
    assert alone == whole, f"the verdicts of {name} depend on what else is in the batch"


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
    _check_plan(name, method, folder, options)


def _check_options(arguments: Sequence[str], config_class: type, folder: Path) -> None:
    """Every option has help, and what cannot be an option, or a value of one, is refused in a sentence."""
    from transformers import TrainingArguments

    from tunevax.modeling.trainer import TrainConfig

    verb, name, *_ = arguments
    fields = [f for f in dataclasses.fields(config_class) if f.name not in _names(TrainingArguments)]
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
    keys = ("schema", "verb", "method", "command", "seed", "config", "data", "versions", "hardware", "started")
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


def _check_plan(name: str, method: Any, folder: Path, options: Sequence[str] = ()) -> None:
    """`tunevax plan` predicts memory for it, or says that it needs no model."""

    command = ("plan", "--method", name, "--model", small_model(folder), "--device", "cpu", "--format", "json")
    trains = hasattr(method, "config_class") or hasattr(method, "plan_training")
    if not trains and models_held(method) == 0:
        assert "needs no model" in refused(*command)
        return
    plan = json.loads(run(*command, *options))
    needs = plan["needs"]
    assert needs["peak"] == sum(needs["kinds"].values()) > 0 and needs["kinds"]["weights"], f"{name} has no plan"
    what = "one that trains" if trains else "one that trains nothing"
    assert (needs["trainable"] > 0) == (plan["sft"] is not None) == trains, f"{name} is not planned as {what}"


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


def _config(config_class: type, folder: Path, options: Sequence[str]) -> Any:
    """An instance of the class from those of the options that are its own."""
    from tunevax.cli.options import parse

    tokens = [*options, "--output-dir", str(folder / "out")]
    others = {token[2:].replace("-", "_") for token in tokens if token.startswith("--")} - _names(config_class)
    return parse("check", [config_class], tokens, ignored=others)[0]


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


def validation_rows(folder: Path) -> str:
    """A file of trusted rows, of prompts that are in no other file."""
    from tunevax.organism import World

    return _written(folder / "validation.jsonl", World().safety("held-out")[:8])


def tuned(folder: Path) -> str:
    """A run folder: the small model with an adapter trained by plain SFT."""
    data = ("--safety-data", safety_rows(folder, ("chosen",)), "--task-data", task_rows(folder))
    small = ("--model", small_model(folder), "--held-out-prompts", "0", *TRAINING)
    return str(_run(folder / "align-sft", "align", "sft", *data, *small))


def _written(file: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(file)
