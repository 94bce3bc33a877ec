"""The contract of everything that is known by a name: what a method, an attack, a judge and a selector keep to, for
tunevax's own and for those of other packages.

    from tunevax.testing import check_aligner

    def test_my_method(tmp_path):
        check_aligner("my-method", tmp_path, "--my-interval", "2")

A check runs commands of tunevax in this process, on the first blocks of the organism and a few of its rows, and raises
an AssertionError that says what does not hold. It writes into `folder`; checks that share one share the model, the data
and the plain run. `options` are for the command, as it takes them: what a run of four steps needs.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import math
import shlex
import shutil
from collections.abc import Iterable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from tunevax.cli import main
from tunevax.cli.options import parse
from tunevax.curation.curate import CurateOptions, Pool, scored
from tunevax.data.roles import load_rows
from tunevax.methods import load_method
from tunevax.modeling.loading import load
from tunevax.modeling.trainer import TrainConfig
from tunevax.organism import World
from tunevax.planning.plan import models_held
from tunevax.records import (
    DATA,
    GENERATIONS,
    HARMFUL,
    LOG,
    RESULTS,
    SCORES,
    Example,
    Row,
    RunRecord,
    read_lines,
    read_run,
)
from tunevax.scoring.judges import Verdict, load_judges, reads_model

BLOCKS = 3  # of the organism, in the model that the checks run on
STEPS, SAVED, KILLED = 4, 2, 3  # steps of a training, one whose checkpoint is kept, and one before which it is killed
TRAINING = (
    *("--max-steps", str(STEPS), "--save-steps", str(SAVED), "--warmup-steps", "0", "--learning-rate", "2e-3"),
    *("--per-device-train-batch-size", "2", "--gradient-accumulation-steps", "2", "--max-length", "48"),
    *("--lora-dropout", "0.1"),
)
"""Two micro-batches a step, and dropout, so that a number taken from a shared generator shows."""
BOTH, SPLITS = ("chosen", "rejected"), ("alignment", "attack", "evaluation")


def check_aligner(name: str, folder: Path, *options: str) -> None:
    """Check an alignment method: its options, a run, the same run resumed, its plan, and that `off` turns it off."""
    method = load_method("tunevax.alignment", name)
    _check_trainer(folder, method, ["align", name, "--held-out-prompts", "0"], options)


def check_finetuner(name: str, folder: Path, *options: str) -> None:
    """Check a method of fine-tuning; as `check_aligner`."""
    _check_trainer(folder, load_method("tunevax.finetuning", name), ["finetune", name], options)


def check_restorer(name: str, folder: Path, *options: str, model: str | None = None) -> None:
    """Check a method of restoration: its options, its plan, and that repeating it on `model` (such as a run folder with
    an adapter; default the small model) writes the same files."""
    method = load_method("tunevax.restoration", name)
    command = ["restore", name, "--model", model or small_model(folder), *options]
    _check_options(folder, command, method)
    first, second = (_run(folder / f"restore-{name}{again}", *command) for again in ("", "-again"))
    _check_run(first)
    for file in (path.relative_to(first) for path in first.rglob("*") if path.is_file()):
        same = file.name in ("run.json", "README.md") or (first / file).read_bytes() == (second / file).read_bytes()
        assert same, f"{file} of {name} differs when the same command is repeated"
    _check_plan(name, method, folder)


def check_selector(name: str, folder: Path, *options: str, any_order: bool = True) -> None:
    """Check a selector: its options, a run, its plan, and that rows have a score each and stay as they are.

    In another order rows must have the same scores; with `any_order=False`, for a selector that trains on the rows or
    draws a number for each as it comes, they must when they come in the same order again.
    """
    method = load_method("tunevax.curation", name)
    safety, trusted = safety_rows(folder), safety_rows(folder, splits=("held-out",))
    model = small_model(folder) if "model" in method.needs else None
    command = ["curate", name, "--keep", "0.5", "--safety-data", safety, "--validation-data", trusted]
    command += ["--model", model] if model else []
    _check_options(folder, command, method)
    out = _run(folder / f"curate-{name}", *command, *options)
    _check_run(out, DATA, SCORES)
    rows, kept = read_lines(out / SCORES), read_lines(out / DATA)
    assert len(kept) == len(rows) // 2, f"{name} kept {len(kept)} of {len(rows)} rows"
    data = load_rows("alignment", safety, BOTH[:1])[:: -1 if any_order else 1]
    validation = load_rows("validation", trusted, BOTH[:1])
    pool = Pool(data, validation, CurateOptions(model=model), model, folder / f"pool-{name}")
    before = copy.deepcopy((data, validation))
    scores = scored(_config(method, folder, options), pool)
    assert (pool.rows, pool.validation) == before, f"{name} changes the rows that it is given"
    first, how = {row["prompt"]: row["score"] for row in rows}, "in another order" if any_order else "again"
    for row, score in zip(data, scores, strict=True):
        same = math.isclose(score, first[row["prompt"]], rel_tol=1e-4, abs_tol=1e-5)
        assert same, f"{name} gives {row['prompt']!r} {first[row['prompt']]}, and {score} where the rows come {how}"
    _check_plan(name, method, folder)


def check_attack(name: str, folder: Path, *options: str, model: str | None = None) -> None:
    """Check an attack: its options, its rows, what it needs, and that model and control are attacked alike.

    The control is a copy of the model, so their rows differ if a second attack by the same seed does. `model` is what
    the attack applies to, a run folder, if that is not every model; then it must refuse the small one.
    """
    kind = load_method("tunevax.attacks", name)
    config = _config(kind, folder, options)
    ref, twin = model or small_model(folder), folder / f"twin-for-{name}"
    shutil.copytree(ref, twin, dirs_exist_ok=True)
    targets = ["--model", ref, "--control", str(twin)]
    start = ["attack", name, "--eval-data", f"{safety_rows(folder)}:split=evaluation", "--judges", "organism"]
    start += ["--limit", "4", "--max-new-tokens", "8", *options]
    data = {"harmful": ["--safety-data", safety_rows(folder)], "task": ["--task-data", task_rows(folder)]}
    needed = {need: tokens for need, tokens in data.items() if need in config.needs and tokens[0] not in options}
    command = [*start, *sum(needed.values(), [])]
    _check_options(folder, [*command, *targets], kind)
    for need, (option, _) in {} if model else needed.items():  # a run that is attacked may name the data itself
        others = sum((tokens for other, tokens in needed.items() if other != need), [])
        assert option in refused(folder, *start, *others, *targets), f"{name} does not say that it needs {option}"
    if model:
        refused(folder, *command, "--model", small_model(folder), "--control", "none")
    out = _run(folder / f"attack-{name}", *command, *targets)
    _check_run(out, RESULTS, GENERATIONS)
    rows = read_lines(out / RESULTS)
    for row in rows:
        _has(row, Row.__annotations__.keys() - {"cell"}, f"a row of {name}")
        actual, wanted = (row["kind"], row["traits"], row["seed"]), (name, config.traits, config.seed)
        assert actual == wanted, f"a row of {name} says {actual}, not {wanted}"
        assert any(score.startswith(HARMFUL) for score in row["scores"]), f"a row of {name} has no harmful score"
    labels = {row["role"]: row["model"] for row in rows}
    assert set(labels) == {"model", "control"}, f"{name} scored {', '.join(labels) or 'nothing'}"
    for lines, what in ((rows, "scores"), (read_lines(out / GENERATIONS), "responses")):
        parts = ([line for line in lines if line["model"] == labels[role]] for role in ("model", "control"))
        ours, theirs = ([{**line, "model": None, "role": None} for line in part] for part in parts)
        assert ours == theirs, f"{name} has other {what} for a copy of the model than for the model"
    steps = [row["step"] for row in rows if row["role"] == "model"]
    assert steps == sorted(set(steps)), f"the steps of {name} are {steps}; each is scored once, in order"
    assert not kind.curve or (steps[0] == 0 and len(steps) > 1), f"a curve starts at step 0, and {name} is {steps}"
    other = dataclasses.replace(config, seed=config.seed + 1)
    hashes = {each.setting_hash(name, [], {"hash": ""}) for each in (config, other)}
    assert len(hashes) == 1, f"the setting of {name} has another hash with another seed"


def check_judge(name: str, rows: Sequence[Example] | None = None) -> None:
    """Check a judge: a verdict for each response, in order, whatever else is in the batch, and the same again. `rows`
    have `prompt`, `chosen` and `rejected`; default five of the organism's."""
    judge = load_judges([name])[name]
    rows = rows or World().safety("evaluation")[:5]
    if reads_model(judge):
        _check_model_judge(name, judge, rows)
        return
    pairs = [(str(row["prompt"]), str(row.get(answer))) for row in rows for answer in BOTH]
    pairs += [(str(rows[0]["prompt"]), text) for text in ("", " ", "use use use use", "\u2028 {} <think>")]

    def verdicts(pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        return judge([prompt for prompt, _ in pairs], [response for _, response in pairs])

    whole, alone = verdicts(pairs), [verdict for pair in pairs for verdict in verdicts([pair])]
    assert verdicts([]) == [], f"{name} has verdicts on no responses"
    assert len(whole) == len(pairs), f"{name} has {len(whole)} verdicts on {len(pairs)} responses"
    _check_verdicts(name, whole)
    assert verdicts(pairs) == whole, f"{name} changes its mind when it is asked again"
    assert verdicts(pairs[::-1]) == whole[::-1], f"the verdicts of {name} are not in the order of the responses"
    assert alone == whole, f"the verdicts of {name} depend on what else is in the batch"


def _check_model_judge(name: str, judge: Any, rows: Sequence[Example]) -> None:
    model, tokenizer, _ = load("organism")
    whole = judge(model, tokenizer, rows)
    assert len(whole) == len(rows), f"{name} has {len(whole)} verdicts on {len(rows)} rows"
    _check_verdicts(name, whole)
    backwards, alone = (
        judge(model, tokenizer, rows[::-1])[::-1],
        [v for r in rows for v in judge(model, tokenizer, [r])],
    )
    for other, what in ((backwards, "the order of the rows"), (alone, "what else is in the batch")):
        alike = [(a.verdict, a.harmful) == (b.verdict, b.harmful) and abs(a.score - b.score) < 1e-3
                 for a, b in zip(whole, other, strict=True)]  # fmt: skip
        assert all(alike), f"the verdicts of {name} depend on {what}"


def _check_verdicts(name: str, verdicts: Sequence[Verdict]) -> None:
    for verdict in verdicts:
        right = isinstance(verdict, Verdict) and verdict.verdict and isinstance(verdict.harmful, bool)
        assert right and (verdict.score is None or 0 <= verdict.score <= 1), f"{name} gives {verdict!r}"


def _check_trainer(folder: Path, method: Any, start: Sequence[str], options: Sequence[str]) -> None:
    verb, name, *_ = command = [*start, "--model", small_model(folder), "--task-data", task_rows(folder), *TRAINING]
    if needs := [answer for answer in BOTH if answer in method.needs]:
        command += ["--safety-data", safety_rows(folder, needs)]
    if "rejected" in needs:
        text = refused(folder, *command[:-1], safety_rows(folder, BOTH[:1]))
        assert "rejected" in text, f"{name} needs rejected and says, without it: {text!r}"
    _check_options(folder, command, method.config_class)
    whole = _run(folder / f"{verb}-{name}", *command, *options)
    record = _check_run(whole, LOG, "prompts.json", _weights(whole))
    _has(record, ("paper", "model", "final_loss", "compute", "template_hash"), f"run.json of {name}")
    assert record["steps"] == STEPS, f"{name} took {record['steps']} steps where {STEPS} were asked for"
    _check_resumed(whole, [*command, *options])
    if name != "sft":
        _check_off(method, whole, command, options)
    _check_plan(name, method, folder, options)


def _check_options(folder: Path, command: Sequence[str], config_class: type) -> None:
    """Every option has help, and what cannot be an option, or a value of one, is refused in a sentence."""
    fields = [f for f in dataclasses.fields(config_class) if f.name not in _names(TrainingArguments)]
    _has([f.name for f in fields if f.metadata.get("help")], [f.name for f in fields], "the help")
    assert "--no-such-option" in refused(folder, *command, "--no-such-option", "1")
    for field in fields:
        if field.name not in _names(TrainConfig) and any(kind in str(field.type) for kind in ("int", "float")):
            text = refused(folder, *command, f"--{field.name}", "nan")
            assert field.name.replace("_", "-") in text.replace("_", "-"), f"{text!r} does not name {field.name}"


def _check_run(out: Path, *files: str) -> RunRecord:
    """A run folder is whole: its files are there and none is left over, and run.json says what was run."""
    _has([path.relative_to(out).as_posix() for path in out.rglob("*")], ("README.md", *files), str(out))
    left = [path.name for path in (*out.parent.glob(f"{out.name}.*"), *out.glob("checkpoint*"))]
    assert not left, f"a finished run left {', '.join(left)}"
    record = read_run(out)
    keys = ("schema", "verb", "method", "command", "seed", "config", "data", "versions", "hardware", "started")
    _has(record, keys, f"run.json of {out.name}")
    if record.get("adapter"):
        assert load(str(out)).tokenizer.chat_template, f"{out} loads without a chat template"
    return record


def _check_resumed(whole: Path, command: Sequence[str]) -> None:
    """A run that is killed and resumed ends in the same weights and the same log, bit for bit."""
    what, cut, begin = " ".join(command[:2]), whole.with_name(f"{whole.name}-killed"), CallbackHandler.on_step_begin

    def killed(
        handler: CallbackHandler, args: TrainingArguments, state: TrainerState, control: TrainerControl
    ) -> TrainerControl:
        if state.global_step == KILLED:
            raise KeyboardInterrupt
        return begin(handler, args, state, control)

    with patch.object(CallbackHandler, "on_step_begin", killed):
        run(*command, "--output-dir", str(cut), code=130)
    partial = cut.with_name(f"{cut.name}.partial")
    assert list(partial.rglob(f"checkpoint-{SAVED}")), f"{what} killed at step {KILLED} left no checkpoint to resume"
    run(*command, "--output-dir", str(cut), "--resume")
    assert read_run(cut).get("resumed"), f"{what} --resume started again"
    for part, same in {
        "weights": (cut / _weights(cut)).read_bytes() == (whole / _weights(whole)).read_bytes(),
        "lines in its log": read_lines(cut / LOG) == read_lines(whole / LOG),
        "compute": read_run(cut)["compute"] == read_run(whole)["compute"],
    }.items():
        assert same, f"{what}, killed and resumed, has other {part} than in one go; see `method_state`"


def _check_off(method: Any, whole: Path, command: Sequence[str], options: Sequence[str]) -> None:
    """With the options of `method.off` it trains what plain SFT trains, bit for bit, and without them it does not."""
    (verb, name, *rest), file = command, _weights(whole)
    full = ["--full-weights"] if file.startswith("model") else []
    plain = (_run(whole.with_name("-".join([verb, "sft", *full])), verb, "sft", *rest, *full) / file).read_bytes()
    assert plain != (whole / file).read_bytes(), f"{name} trains what sft trains, though it is not off"
    if method.off is not None:
        knobs = [token for option, value in method.off.items() for token in (f"--{option}", str(value))]
        off = _run(whole.with_name(f"{whole.name}-off"), *command, *options, *knobs)
        same = plain == (off / file).read_bytes()
        assert same, f"{name} {' '.join(knobs)} does not train what sft trains; fix it, or set `off`"


def _check_plan(name: str, method: Any, folder: Path, options: Sequence[str] = ()) -> None:
    """`tunevax plan` predicts memory for it, or says that it needs no model."""
    command = ("plan", "--method", name, "--model", small_model(folder), "--device", "cpu", "--format", "json")
    trains = hasattr(method, "config_class") or hasattr(method, "plan_training")
    if not trains and models_held(method) == 0:
        assert "needs no model" in run(*command, code=2), f"{name} needs no model, and its plan does not say so"
        return
    needs = json.loads(run(*command, *options))["needs"]
    assert needs["peak"] == sum(needs["kinds"].values()) > 0 and needs["kinds"]["weights"], f"{name} has no plan"
    assert (needs["trainable"] > 0) == trains, f"{name} is not planned as one that trains{'' if trains else ' nothing'}"


def _has(present: Iterable[str], wanted: Iterable[str], what: str) -> None:
    missing = sorted({*wanted} - {*present})
    assert not missing, f"{what} has no {', '.join(missing)}"


def _weights(out: Path) -> str:
    """The file of a run's weights, relative to it."""
    place = read_run(out).get("adapter")
    assert place in ("adapter", "model"), f"run.json of {out.name} says in `adapter` neither adapter nor model"
    return f"{place}/{'adapter_' if place == 'adapter' else ''}model.safetensors"


def _config(config_class: type, folder: Path, options: Sequence[str]) -> Any:
    """An instance of the class from those of the options that are its own."""
    tokens = [*options, "--output-dir", str(folder / "out")]
    others = {token[2:].replace("-", "_") for token in tokens if token.startswith("--")} - _names(config_class)
    return parse("check", [config_class], tokens, ignored=others)[0]


def _names(config_class: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(config_class)}


def run(*arguments: str, code: int = 0) -> str:
    """Run a command in this process; returns what it printed, on stderr if `code` is not 0."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        exit_code = main(list(arguments))
    command = shlex.join(["tunevax", *arguments])
    assert exit_code == code, f"exit code {exit_code}, not {code}, of {command}: {err.getvalue().strip()[-500:]}"
    return (err if code else out).getvalue()


def refused(folder: Path, *arguments: str) -> str:
    """Run a command that must be refused; returns its one sentence."""
    text = run(*arguments, "--output-dir", str(folder / "refused"), code=2)
    one = text.startswith("tunevax: ") and text.count("\n") == 1 and "--debug" not in text
    assert one, f"not one sentence but {text!r}, of {shlex.join(['tunevax', *arguments])}"
    return text


def _run(out: Path, *arguments: str) -> Path:
    """The run folder of a command, which is run if it is not there."""
    if not (out / "run.json").is_file():
        run(*arguments, "--output-dir", str(out))
    return out


def small_model(folder: Path) -> str:
    """A model folder: the organism's first blocks, with its tokenizer and chat template."""
    out = folder / "small"
    if not out.is_dir():
        loaded = load("organism")
        loaded.model.model.layers = loaded.model.model.layers[:BLOCKS]
        loaded.model.config.num_hidden_layers = BLOCKS
        loaded.model.save_pretrained(out)
        loaded.tokenizer.save_pretrained(out)
    return str(out)


def safety_rows(folder: Path, answers: Sequence[str] = BOTH, splits: Sequence[str] = SPLITS) -> str:
    """A file of 20 rows of each of these splits of the organism's safety data, with these answers and no others."""
    rows = [{**row, "split": split} for split in splits for row in World().safety(split)[:20]]
    return _written(folder / f"{'-'.join((*splits, *answers))}.jsonl", rows, "prompt", "category", "split", *answers)


def task_rows(folder: Path) -> str:
    """A file of rows of the organism's benign recipes, to train on and to score on."""
    parts = {"train": World().benign("mix")[:20], "evaluation": World().benign("evaluation")[:8]}
    rows = [{**row, "split": split} for split, part in parts.items() for row in part]
    return _written(folder / "task.jsonl", rows, "prompt", "completion", "split")


def _written(file: Path, rows: Iterable[dict[str, Any]], *keys: str) -> str:
    file.write_text("".join(json.dumps({key: row[key] for key in keys}) + "\n" for row in rows), encoding="utf-8")
    return str(file)
