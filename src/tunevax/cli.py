"""The command line: `tunevax VERB METHOD --option value`, options from dataclasses, `--config FILE` below them."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tunevax import __version__
from tunevax.errors import RunError, TunevaxError, UsageError, unknown
from tunevax.methods import load_method, methods
from tunevax.quiet import hush, quiet
from tunevax.yaml_files import meant, read_yaml

HELP = """tunevax hardens open-weight language models against harmful fine-tuning, and measures how much it helped.

  tunevax demo                        the whole of it on a tiny model, in three to six minutes
  tunevax plan --method METHOD --model REF --gpu 24GB
                                      the memory and the cost of a step before a GPU is rented
  tunevax curate METHOD --model REF --safety-data SRC --validation-data SRC --keep 0.4 --output-dir OUT
                                      choose the alignment rows worth keeping
  tunevax align METHOD --model REF --safety-data SRC --output-dir OUT
                                      harden a model before its release
  tunevax finetune METHOD --model RUN --task-data SRC --safety-data SRC --output-dir OUT
                                      run a customer's job with a defence beside it
  tunevax restore METHOD --model RUN --output-dir OUT
                                      repair a fine-tuned model, without training
  tunevax attack METHOD --model RUN --safety-data SRC --task-data SRC --output-dir OUT
                                      attack it in one way, beside a control, and score along the way
  tunevax audit --model RUN --control RUN --protocol quick --output-dir OUT
                                      a grid of attacks with several seeds, and a report on what a defence is worth
  tunevax score --model REF --safety-data SRC --output-dir OUT
                                      score a model as it is
  tunevax analyze sink --model RUN --safety-data SRC --output-dir OUT
                                      look for the attention heads that turn to harmful text
  tunevax report RUN [RUN ...]        one HTML page from the results, or Markdown, or JSON

REF is a hub id, a model folder, a run folder, or organism (the built-in tiny model); SRC is a JSONL, JSON, CSV or
parquet file, a hub id, or organism. `tunevax VERB` lists the methods of a verb; `tunevax VERB METHOD --help` its
options. Every option can stand in a YAML file: --config FILE. Add --debug to see a traceback."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 for a failed run, 2 for a wrong invocation, 130 or 143 when it was
    interrupted or terminated."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # `>&-`
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - for good
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a locale without `·` must not end a run
    if argv is None:
        signal.signal(signal.SIGTERM, _terminate)
    code = 0
    try:
        code = _run(arguments)
    except BrokenPipeError:  # `tunevax ... | head`: what it prints is no longer wanted
        pass
    except KeyboardInterrupt as stop:
        if argv is None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the way out is short, and no place for a traceback
        word, code = ("terminated", 143) if isinstance(stop, _Terminated) else ("interrupted", 130)
        _say(f"tunevax: {word}{f'; {stop}' if str(stop) else ''}")
    finally:
        code = _flush(code)
    return code


def _run(arguments: list[str]) -> int:
    """The command, its errors as one sentence each; returns the exit code."""
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    hush()
    try:
        if not arguments or arguments[0] in ("--help", "-h", "help"):
            print(HELP)
        elif arguments[0] in ("--version", "-V"):
            print(__version__)
        elif arguments[0] in VERBS:
            VERBS[arguments[0]](arguments[1:])
        else:
            raise unknown("verb", arguments[0], VERBS)
    except Exception as error:
        if debug or (isinstance(error, BrokenPipeError) and _nobody_reads()):
            raise
        known = error if isinstance(error, TunevaxError) else _library_error(error)
        _say(f"tunevax: {known}")
        return known.exit_code
    return 0


class _Terminated(KeyboardInterrupt):
    """SIGTERM: what a batch system sends when the time is up. It unwinds as Ctrl-C does."""


def _terminate(*_: Any) -> None:
    raise _Terminated


def _say(line: str) -> None:
    """A line on stderr, if anybody reads it."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def _nobody_reads() -> bool:
    """Whether stdout is a pipe whose reader has left, as against any other pipe of the program."""
    import select

    if not hasattr(select, "poll"):  # Windows
        return True
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _flush(code: int) -> int:
    """Write out what stdout still holds; returns the exit code. What cannot be written goes nowhere, so that the
    interpreter does not stumble over it at its end."""
    try:
        sys.stdout.flush()
    except OSError as error:
        with contextlib.suppress(OSError, ValueError), open(os.devnull, "w", encoding="utf-8") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            _say(f"tunevax: stdout cannot be written: {error.strerror}")
            return code or 1
    return code


def _library_error(error: Exception) -> TunevaxError:
    """One sentence for an error that tunevax did not foresee."""
    from tunevax.runs import stop_on

    first = (str(error).strip().splitlines() or ["no message"])[0]
    return stop_on(error) or TunevaxError(f"{type(error).__name__}: {first} (run again with --debug for the traceback)")


# --- verbs ---------------------------------------------------------------------------------------------------------


def _curate(arguments: list[str]) -> None:
    name, rest = _method("curate", "tunevax.curation", arguments)
    if name is None:
        return
    quiet()
    selector = load_method("tunevax.curation", name)
    from tunevax.curation.curate import CurateOptions, curate
    from tunevax.runs import read_run

    options, config = _parse(f"curate {name}", [CurateOptions, selector], rest)
    out = curate(name, options, config, _command("curate", arguments))
    record = read_run(out)
    dropped = ", ".join(f"{n} {why}" for why, n in record["dropped"].items()) or "none"
    told = f"{name} kept {record['kept']} of {record['data'][0]['rows']} rows; dropped: {dropped}"
    if "agreement" in record:
        told += "; rank agreement with the target model {spearman:.2f} (Spearman)".format(**record["agreement"])
    print(told)
    if record["elsewhere"]:
        print(
            f"{record['elsewhere']} more rows are for attack and evaluation; the source's option split=all takes them"
        )
    if record["spoilt_kept"]:
        print(f"{record['spoilt_kept']} of the kept rows are marked as spoilt; take those out before you train")
    _done(f"next: tunevax align METHOD --model REF --safety-data {_short(out)} --output-dir OUT; scores and rows", out)


def _align(arguments: list[str]) -> None:
    cls_name, rest = _method("align", "tunevax.alignment", arguments)
    if cls_name is None:
        return
    quiet()
    trainer_class = load_method("tunevax.alignment", cls_name)
    from tunevax.alignment.align import AlignOptions, align
    from tunevax.alignment.held_out import sentences
    from tunevax.runs import is_main_process, read_run

    options, config = _parse(f"align {cls_name}", [AlignOptions, trainer_class.config_class], rest)
    out = align(trainer_class, cls_name, options, config, _command("align", arguments))
    _leave_the_group()
    if is_main_process():
        print("\n".join(sentences(read_run(out)["held_out"])))
    _done(f"{cls_name} done ({_data_told(out)}), {'model' if config.full_weights else 'adapter'}", out)


def _finetune(arguments: list[str]) -> None:
    name, rest = _method("finetune", "tunevax.finetuning", arguments)
    if name is None:
        return
    quiet()
    trainer_class = load_method("tunevax.finetuning", name)
    from tunevax.finetuning.finetune import FinetuneOptions, finetune
    from tunevax.runs import read_run

    options, config = _parse(f"finetune {name}", [FinetuneOptions, trainer_class.config_class], rest)
    out = finetune(trainer_class, name, options, config, _command("finetune", arguments))
    _leave_the_group()
    if screened := read_run(out).get("screen"):
        print(
            f"{screened['flagged']} rows flagged at the door, {screened['dropped']} dropped: {_short(out)}/screen.jsonl"
        )
    _done(f"{name} done ({_data_told(out)}), {'model' if config.full_weights else 'adapter'}", out)


def _restore(arguments: list[str]) -> None:
    name, rest = _method("restore", "tunevax.restoration", arguments)
    if name is None:
        return
    quiet()
    method = load_method("tunevax.restoration", name)
    from tunevax.restoration.restore import RestoreOptions, restore

    options, config = _parse(f"restore {name}", [RestoreOptions, method], rest)
    out = restore(name, options, config, _command("restore", arguments))
    _done(f"{name} done; next: tunevax report {_short(out)}; written", out)


def _plan(arguments: list[str]) -> None:
    from tunevax.planning.plan import FOLDERS, PlanOptions

    if not arguments or "--help" in arguments or "-h" in arguments:
        _print_help("plan", [PlanOptions])
        print("\nand every option of the method: tunevax align METHOD --help, and likewise of the other verbs.")
        return
    given = _value_of("method", arguments)
    if given is None:
        raise UsageError("--method is missing; name one that align, finetune, curate or restore has, such as t-vaccine")
    name = given.replace("_", "-")
    known = {n: folder for folder in reversed(FOLDERS) for n in methods(folder)}
    if name not in known:
        raise unknown("method", given, known)
    quiet()
    import dataclasses
    import json

    from tunevax.alignment.align import AlignOptions
    from tunevax.curation.curate import CurateOptions
    from tunevax.finetuning.finetune import FinetuneOptions
    from tunevax.planning.plan import as_dict, lines, plan
    from tunevax.restoration.restore import RestoreOptions

    method = load_method(known[name], name)
    config_class = getattr(method, "config_class", method)
    # What a command says of data makes no difference here: `align METHOD` becomes `plan --method METHOD`, and no more.
    taken = {f.name for cls in (PlanOptions, config_class) for f in dataclasses.fields(cls)}
    classes = (AlignOptions, FinetuneOptions, CurateOptions, RestoreOptions)
    others = {f.name: f for cls in classes for f in dataclasses.fields(cls)}
    ignored = dataclasses.make_dataclass(
        "Ignored",
        [(f.name, f.type, dataclasses.field(default=f.default)) for f in others.values() if f.name not in taken],
    )
    below: dict[str, Any] = {"output_dir": "plan"}
    if "use_cpu" in taken:
        below["use_cpu"] = True  # where it would run is not here
    options, config, _ = _parse("plan", [PlanOptions, config_class, ignored], arguments, below)
    options.method = name
    if options.device != "cpu" and _value_of("checkpoint-blocks", arguments) in (None, "auto"):
        config.checkpoint_blocks = "frozen"  # what auto is on an accelerator
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what a trainer notes is no part of the plan
            found = plan(options, method, config)
    except (NotImplementedError, RuntimeError) as error:
        what = str(error).strip().splitlines()[0][:120]
        raise UsageError(
            f"{name} on {options.model} cannot be planned: what it computes depends on values, as a mixture of experts "
            f"does ({what})"
        ) from error
    print(
        json.dumps(as_dict(found, options), indent=1) if options.format == "json" else "\n".join(lines(found, options))
    )


def _value_of(name: str, arguments: list[str]) -> str | None:
    """The value of an option that decides which others there are, from the command line or its --config."""
    found = None
    for i, token in enumerate(arguments):
        flag, equals, value = token.partition("=")
        value = value if equals else arguments[i + 1] if i + 1 < len(arguments) else None
        if flag == "--config" and value and Path(value).is_file() and found is None:
            content = read_yaml(value, words=True)
            found = content.get(name, content.get(name.replace("-", "_"))) if isinstance(content, dict) else None
        if flag.replace("_", "-") == f"--{name}":
            return value
    return found if found is None else str(found)


def _analyze(arguments: list[str]) -> None:
    import json

    if not arguments or arguments[0] in ("--help", "-h"):
        print("tunevax analyze sink --option value: sink divergence by head and layer (arXiv 2602.05228)")
        return
    what, *rest = arguments
    if what != "sink":
        raise unknown("analysis", what, ["sink"])
    quiet()
    from tunevax.finetuning.analyze import SinkOptions, analyze_sink

    (options,) = _parse("analyze sink", [SinkOptions], rest)
    out = analyze_sink(options, _command("analyze", arguments))
    for model in json.loads((out / "sink.json").read_text(encoding="utf-8"))["models"]:
        print(f"{model['label']}: {model['positive_heads']} of {model['heads']} heads attend more to the sink on harm")
    _done(f"next: tunevax report {_short(out)}; sink analysis", out)


def _attack(arguments: list[str]) -> None:
    name, rest = _method("attack", "tunevax.attacks", arguments)
    if name is None:
        return
    quiet()
    kind = load_method("tunevax.attacks", name)
    from tunevax.attacks.attack import AttackOptions, attack

    options, config = _parse(f"attack {name}", [AttackOptions, kind], rest)
    out = attack(name, options, config, _command("attack", arguments))
    print(f"attack {name} done ({_data_told(out)}), {_worst(out)}")
    _done(f"next: tunevax report {out} --output report.html; results", out)


def _score(arguments: list[str]) -> None:
    if not arguments:
        arguments = ["--help"]
    quiet()
    from dataclasses import dataclass, field

    from tunevax.data.encoding import TEMPLATE_HELP
    from tunevax.scoring.score import score
    from tunevax.scoring.suite import SuiteOptions

    @dataclass
    class ScoreOptions(SuiteOptions):
        model: list[str] = field(default_factory=list, metadata={"help": "hub id, folder or run; may be repeated"})
        safety_data: str | None = field(default=None, metadata={"help": "its evaluation split is scored"})
        task_data: str | None = field(default=None, metadata={"help": "its evaluation split measures accuracy"})
        output_dir: str | None = field(default=None, metadata={"help": "the run folder to write"})
        chat_template: str | None = field(default=None, metadata={"help": TEMPLATE_HELP})
        revision: str | None = field(default=None, metadata={"help": "revision of a hub id"})
        dtype: str = field(default="auto", metadata={"help": "auto, float32, bfloat16, float16"})
        allow_overlap: bool = field(default=False, metadata={"help": "score on prompts the model was trained on"})
        drop_overlap: bool = field(default=False, metadata={"help": "leave these prompts out, and record them"})
        overwrite: bool = field(default=False, metadata={"help": "replace a finished run"})

    (options,) = _parse("score", [ScoreOptions], arguments)
    if not options.model:
        raise UsageError("--model is missing")
    if not options.output_dir:
        raise UsageError("--output-dir is missing")
    values = dict(vars(options))
    extra = (
        "model",
        "safety_data",
        "task_data",
        "output_dir",
        "chat_template",
        "revision",
        "dtype",
        "allow_overlap",
        "drop_overlap",
        "overwrite",
    )
    taken = {name: values.pop(name) for name in extra}
    out = score(
        taken.pop("model"),
        SuiteOptions(**values),
        taken.pop("output_dir"),
        **taken,
        command=_command("score", arguments),
    )
    _done(f"scored, {_worst(out)}; results", out)


def _audit(arguments: list[str]) -> None:
    if not arguments:
        arguments = ["--help"]
    if "--compare" in arguments:
        _compare(arguments)
        return
    quiet()
    from tunevax.audit.audit import audit
    from tunevax.audit.plan import AuditOptions, plan
    from tunevax.audit.protocol import load_protocol
    from tunevax.runs import read_run

    (asked,) = _parse("audit", [AuditOptions], arguments)
    (options,) = _parse("audit", [AuditOptions], arguments, load_protocol(asked.protocol).scoring)
    references: list[tuple[str, str]] = []
    if options.controls and not options.dry_run:
        from tunevax.audit.controls import make_controls

        for ref in options.model:
            print(f"controls of {ref}: {', '.join(options.controls)}")
            found = make_controls(
                ref, options.controls, Path(f"{Path(str(options.output_dir))}.controls"), _command("audit", arguments)
            )
            references += [(label, str(made)) for label, made, _ in found if made is not None]
            for label, made, why in found:
                if made is None:
                    print(f"no control {label}: {why}")
    planned = plan(options, references)
    if options.dry_run:
        from tunevax.audit.estimate import show

        show(planned)
        return
    out = audit(planned, _command("audit", arguments))
    from tunevax.report import write_report

    summary = write_report([out], out / "report.html")
    print("\n".join(summary.headline))
    failed = read_run(out)["failed"]
    if failed:
        raise RunError(
            f"{len(failed)} of {read_run(out)['cells']} cells failed, the first with {failed[0]['error']}; the same "
            f"command runs them again; the rest is in {out / 'report.html'}"
        )
    _done("audit", out / "report.html")


def _compare(arguments: list[str]) -> None:
    import argparse

    parser = _Parser(prog="tunevax audit", description="Two audits side by side, if they can be compared.")
    parser.add_argument("--compare", nargs=2, type=Path, required=True, metavar=("A", "B"), help="audit run folders")
    options = parser.parse_args(arguments, argparse.Namespace())
    from tunevax.evidence.compare import compare

    print(compare(*options.compare))


def _report(arguments: list[str]) -> None:
    import argparse

    from tunevax.report import FORMATS, write_report

    parser = _Parser(prog="tunevax report", description="One self-contained page from run folders.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders of any verb")
    parser.add_argument("--output", type=Path, default=None, help="the file to write; default RUN/report.FORMAT")
    parser.add_argument(
        "--format", default="html", metavar="FORMAT", help="html (default), md (sentences and tables) or json (numbers)"
    )
    options = parser.parse_args(arguments or ["--help"], argparse.Namespace())
    if options.format not in FORMATS:
        raise unknown("format", options.format, FORMATS)
    output = options.output or options.runs[0] / f"report.{options.format}"
    summary = write_report(options.runs, output, options.format)
    print("\n".join(summary.headline))
    _done("report", output)


def _demo(arguments: list[str]) -> None:
    parser = _Parser(
        prog="tunevax demo", description="Align, attack and report on the organism, in three to six minutes."
    )
    parser.add_argument("--output-dir", type=Path, default=Path("demo"), help="folder for the runs and the report")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier demo in that folder")
    options = parser.parse_args(arguments)
    quiet()
    from tunevax.demo import demo

    demo(options.output_dir, options.overwrite)


VERBS: dict[str, Callable[[list[str]], None]] = {
    "plan": _plan, "curate": _curate, "align": _align, "finetune": _finetune, "restore": _restore, "attack": _attack,
    "audit": _audit, "score": _score, "analyze": _analyze, "report": _report, "demo": _demo,
}  # fmt: skip


# --- methods -------------------------------------------------------------------------------------------------------


def _method(verb: str, folder: str, arguments: list[str]) -> tuple[str | None, list[str]]:
    known = methods(folder)
    if not arguments or arguments[0] in ("--help", "-h"):
        print(f"tunevax {verb} METHOD --option value; METHOD is one of\n")
        width = max(map(len, known))
        for name, target in known.items():
            print(f"  {name:{width}}  {_first_line(target)}")
        print(f"\n`tunevax {verb} METHOD --help` shows its options.")
        return None, []
    if arguments[0].startswith("-"):
        raise UsageError(f"`tunevax {verb}` takes a method first; known: {', '.join(known)}")
    name = arguments[0].replace("_", "-")
    if name not in known:
        raise unknown("method", arguments[0], known)
    return name, arguments[1:]


def _first_line(target: str) -> str:
    """The first line of a method's docstring, read without importing it."""
    spec = importlib.util.find_spec(target.partition(":")[0])
    doc = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) if spec and spec.origin else None
    return (doc or "").split("\n")[0]


# --- options -------------------------------------------------------------------------------------------------------


def _parse(title: str, classes: list[type], arguments: list[str], below: dict[str, Any] | None = None) -> tuple:
    """Dataclass instances from the command line over `--config FILE` over `below` over defaults.

    Raises:
        UsageError: an unknown option or key (with the nearest known one), or a value of the wrong type.
    """
    import dataclasses

    from transformers.hf_argparser import HfArgumentParser

    class Parser(HfArgumentParser):
        def error(self, message: str) -> None:
            raise UsageError(f"{title}: {message}")

    fields = {f.name: f for cls in classes for f in dataclasses.fields(cls) if f.init}
    if "--help" in arguments or "-h" in arguments:
        _print_help(title, classes)
        raise SystemExit(0)
    parser = Parser(classes, allow_abbrev=False)
    if "--help-all" in arguments:
        parser.prog = f"tunevax {title}"
        parser.print_help()
        raise SystemExit(0)
    tokens = _from_file(arguments, fields) + _gathered(arguments, fields)
    given = {t[2:].partition("=")[0].replace("-", "_") for t in tokens if t.startswith("--")}
    tokens = _tokens({k: v for k, v in (below or {}).items() if k not in given}, fields) + tokens
    for token in tokens:
        if token.startswith("--"):
            name = token[2:].partition("=")[0].replace("-", "_")
            if name not in fields and not (name.startswith("no_") and name[3:] in fields):
                known = {f.replace("_", "-") for f in fields}
                raise unknown("option", token.partition("=")[0], {f"--{k}" for k in known})
    if "output_dir" in fields and not any(t.partition("=")[0].replace("_", "-") == "--output-dir" for t in tokens):
        raise UsageError("--output-dir is missing")
    found = parser.parse_args_into_dataclasses(tokens, look_for_args_file=False, return_remaining_strings=True)
    if found[-1]:
        raise UsageError(f"{title}: what is {found[-1][0]!r}? Options are written --name value")
    return tuple(found[:-1])


def _gathered(arguments: list[str], fields: dict[str, Any]) -> list[str]:
    """The command line without --config, repeated list options joined (`--model A --model B`)."""
    tokens: list[str] = []
    lists: dict[str, list[str]] = {}
    current: list[str] = tokens
    skip = False
    for token in arguments:
        if skip:
            skip = False
            continue
        if token == "--config" or token.startswith("--config="):
            skip = token == "--config"
            current = tokens
            continue
        if token.startswith("--"):
            flag, equals, value = token.partition("=")
            name = flag[2:].replace("-", "_")
            if name in fields and "list" in str(fields[name].type):
                current = lists.setdefault(flag, [])
                current += [value] if equals else []
                continue
            current = tokens
        current.append(token)
    for flag, values in lists.items():
        tokens += [flag, *values]
    return tokens


def _from_file(arguments: list[str], fields: dict[str, Any]) -> list[str]:
    """The options of `--config FILE` as command-line tokens, so that one parser converts every value."""
    paths = [a.partition("=")[2] for a in arguments if a.startswith("--config=")]
    paths += [b for a, b in zip(arguments, arguments[1:], strict=False) if a == "--config"]
    given = {a[2:].partition("=")[0].replace("-", "_") for a in arguments if a.startswith("--")}
    tokens: list[str] = []
    for path in paths:
        content, typed = read_yaml(path, words=True), read_yaml(path)
        if not isinstance(content, dict):
            raise UsageError(f"{path} must hold `option: value` lines")
        for key, value in content.items():
            name = str(key).replace("-", "_")
            if name not in fields:
                raise UsageError(f"{path}: {unknown('key', str(key), fields)}")
            if value is None and fields[name].default is not None:
                raise UsageError(f"{path}: {key} has no value; give it one, or leave the line out for the default")
            if name not in given:
                tokens += _tokens({name: typed[key] if isinstance(value, dict) else value}, fields)
    return tokens


def _tokens(options: dict[str, Any], fields: dict[str, Any]) -> list[str]:
    """Option values from YAML as command-line tokens, so that one parser converts every value."""
    import json

    tokens: list[str] = []
    for name, value in options.items():
        if value is None:
            continue
        kind = fields[name].type if name in fields else str
        values = [meant(v, name, kind) for v in (value if isinstance(value, list) else [value])]
        words = [str(v).lower() if isinstance(v, bool) else json.dumps(v) if isinstance(v, dict) else str(v)
                 for v in values]  # fmt: skip
        # `=`, since a value may begin with a dash
        tokens += [f"--{name}", *words] if isinstance(value, list) else [f"--{name}={words[0]}"]
    return tokens


# Defaults that tunevax sets for itself; nobody needs to see them first.
HIDDEN = (
    "logging_nan_inf_filter",
    "disable_tqdm",
    "remove_unused_columns",
    "ddp_find_unused_parameters",
    "logging_steps",
)
PLAIN = {
    "output_dir": "the run folder to write",
    "seed": "of data order, adapter start and every named generator",
    "max_steps": "optimiser steps; overrides --num-train-epochs",
    "gradient_accumulation_steps": "micro-batches per optimiser step",
    "bf16": "mixed precision on an accelerator",
}


def _print_help(title: str, classes: list[type]) -> None:
    """The options that tunevax declares, the method's own first, then those of training in general."""
    import dataclasses

    from rich.console import Console
    from rich.table import Table

    class Page(Console):
        def on_broken_pipe(self) -> None:
            """As `print` does, and not rich's exit with 1."""
            raise

    fields = {f.name: f for cls in reversed(classes) for f in dataclasses.fields(cls) if f.init}
    own = [
        b for cls in classes for b in cls.__mro__ if dataclasses.is_dataclass(b) and b.__name__ != "TrainingArguments"
    ]
    names = [n for cls in own for n in cls.__dict__.get("__annotations__", {}) if n in fields]  # no class variables
    names += [n for n in PLAIN if n in fields]
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for name in dict.fromkeys(n for n in names if n not in HIDDEN):
        field = fields[name]
        default = field.default_factory() if callable(field.default_factory) else field.default
        shown = " ".join(map(str, default)) if isinstance(default, list) else "" if default is None else str(default)
        table.add_row(
            f"--{name.replace('_', '-')}", PLAIN.get(name) or field.metadata.get("help", ""), f"[dim]{shown}[/dim]"
        )
    Page().print(f"tunevax {title}\n", table, sep="\n", highlight=False)
    if "max_steps" in fields:
        print("\nand every field of transformers.TrainingArguments; `--help-all` shows them.")


class _Parser:
    """argparse whose errors are UsageErrors."""

    def __new__(cls, **kwargs: Any) -> Any:
        import argparse

        class Parser(argparse.ArgumentParser):
            def error(self, message: str) -> None:
                raise UsageError(f"{self.prog}: {message}")

        return Parser(**kwargs)


# --- what the person sees ------------------------------------------------------------------------------------------


def _leave_the_group() -> None:
    """Under a launcher, part in order: a process group torn down at exit, with a trainer alive, aborts now and then."""
    import gc

    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _command(verb: str, arguments: list[str]) -> str:
    return shlex.join(["tunevax", verb, *arguments])


def _data_told(out: Path) -> str:
    """The rows a run used, by role, and where they repeat."""
    from tunevax.runs import read_run

    told = []
    for entry in read_run(out)["data"]:
        repeats = f", {entry['distinct']} distinct" if entry["distinct"] < entry["rows"] else ""
        told.append(f"{entry['role']} {entry['rows']} rows{repeats}")
    return "; ".join(told)


def _worst(out: Path) -> str:
    """The worst harmful score of each model in a results file, in words."""
    import json

    worst: dict[str, tuple[float, str]] = {}
    for line in (out / "results.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for name, value in row["scores"].items():
            if name.startswith("harmful/") and value["value"] >= worst.get(row["model"], (-1.0, ""))[0]:
                worst[row["model"]] = (value["value"], name.partition("/")[2])
    return "worst harmful score " + ", ".join(f"{m} {v:.0%} ({j})" for m, (v, j) in worst.items())


def _done(what: str, path: Path) -> None:
    from tunevax.runs import is_main_process

    if not is_main_process():
        return
    print(f"{what}: {_short(path)}")


def _short(path: Path) -> Path:
    """Relative to where the person is, if below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
