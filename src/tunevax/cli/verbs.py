"""The verbs of the command line, and what each prints at its end."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import gc
import importlib.util
import json
import re
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tunevax.cli.options import Parser, parse, print_help, value_of
from tunevax.errors import RunError, UsageError, unknown
from tunevax.methods import attribute, load_method, methods
from tunevax.quiet import quiet
from tunevax.records import RESULTS, SINK, harmful, read_lines, read_object, read_run

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from tunevax.modeling.trainer import TrainConfig


class Verb(NamedTuple):
    """A verb: its usage, its summary in one line, and its function."""

    usage: str
    summary: str
    run: Callable[[list[str]], None]


class MethodVerb(NamedTuple):
    """A verb that takes a method first: the package of its methods, and what it prints at its end."""

    folder: str
    done: Callable[[Path, str, Any], list[str]]


def _curated(out: Path, name: str, _config: object) -> list[str]:
    record = read_run(out)
    dropped = ", ".join(f"{n} {why}" for why, n in record["dropped"].items()) or "none"
    line = f"{name} kept {record['kept']} of {record['data'][0]['rows']} rows; dropped: {dropped}"
    if "agreement" in record:
        line += "; rank agreement with the target model {spearman:.2f} (Spearman)".format(**record["agreement"])
    elsewhere = "more rows are for attack and evaluation; the source's option split=all takes them"
    corrupted = "of the kept rows are marked as corrupted; remove them before you train"
    notes = ((record["elsewhere"], elsewhere), (record["corrupted_kept"], corrupted))
    command = f"tunevax align METHOD --model REF --safety-data {short(out)} --output-dir OUT"
    return [line, *(f"{n} {what}" for n, what in notes if n), f"next: {command}; scores and rows: {short(out)}"]


def _trained(out: Path, name: str, config: TrainConfig) -> list[str]:
    from tunevax.alignment.held_out import sentences

    record = read_run(out)
    lines = sentences(record["held_out"]) if "held_out" in record else []
    if screened := record.get("screen"):
        flagged, dropped = screened["flagged"], screened["dropped"]
        lines.append(f"data screening flagged {flagged} rows and dropped {dropped}: {short(out)}/screen.jsonl")
    kind = "model" if config.full_weights else "adapter"
    return [*lines, f"{name} done ({_rows_used(out)}), {kind}: {short(out)}"]


def _restored(out: Path, name: str, _config: object) -> list[str]:
    return [f"{name} done; next: tunevax report {short(out)}; written: {short(out)}"]


def _attacked(out: Path, name: str, _config: object) -> list[str]:
    lines = [f"attack {name} done ({_rows_used(out)}), {_worst(out)}"]
    return [*lines, f"next: tunevax report {out} --output report.html; results: {short(out)}"]


METHOD_VERBS = {
    "curate": MethodVerb("tunevax.curation", _curated),
    "align": MethodVerb("tunevax.alignment", _trained),
    "finetune": MethodVerb("tunevax.finetuning", _trained),
    "restore": MethodVerb("tunevax.restoration", _restored),
    "attack": MethodVerb("tunevax.attacks", _attacked),
}
"""The module FOLDER.VERB of each has its options, such as `AlignOptions`, and its function, such as `align`."""


def options_of(verb: str) -> type[DataclassInstance]:
    """The options of a verb that takes a method, besides the method's own."""
    return attribute(f"{METHOD_VERBS[verb].folder}.{verb}:{verb.capitalize()}Options")


def run_method(verb: str, arguments: list[str]) -> None:
    """`tunevax VERB METHOD --option value`."""
    folder, done = METHOD_VERBS[verb]
    known = methods(folder)
    if not arguments or arguments[0] in ("--help", "-h"):
        usage = f"tunevax {verb} METHOD --option value; METHOD is one of"
        return print(usage, "", *lines_of(folder), "", f"`tunevax {verb} METHOD --help` shows its options.", sep="\n")
    if arguments[0].startswith("-"):
        raise UsageError(f"`tunevax {verb}` takes a method first; known: {', '.join(known)}")
    name = arguments[0].replace("_", "-")
    if name not in known:
        raise unknown("method", arguments[0], known)
    quiet()
    method = load_method(folder, name)
    config_class = getattr(method, "config_class", method)
    options, config = parse(f"{verb} {name}", [options_of(verb), config_class], arguments[1:])
    trainer = [method] if config_class is not method else []
    out = attribute(f"{folder}.{verb}:{verb}")(*trainer, name, options, config, _command(verb, arguments))
    _finish(lambda: done(out, name, config))


def _plan(arguments: list[str]) -> None:
    from tunevax.planning.plan import FOLDERS, PlanOptions, as_dict, lines, plan

    if not arguments or "--help" in arguments or "-h" in arguments:
        print_help("plan", [PlanOptions])
        return print("\nand every option of the method: tunevax align METHOD --help, and likewise of the other verbs.")
    given = value_of("method", arguments)
    if given is None:
        raise UsageError("--method is missing; name one that align, finetune, curate or restore has, such as t-vaccine")
    name = given.replace("_", "-")
    folders = {n: folder for folder in reversed(FOLDERS) for n in methods(folder)}
    if name not in folders:
        raise unknown("method", given, folders)
    quiet()
    method = load_method(folders[name], name)
    config_class = getattr(method, "config_class", method)
    # The other options of the verb are accepted and ignored, so that only `align METHOD` must be edited in a command.
    verb = next(name_of for name_of, v in METHOD_VERBS.items() if v.folder == folders[name])
    taken = {f.name for cls in (PlanOptions, config_class) for f in dataclasses.fields(cls)}
    ignored = {f.name for f in dataclasses.fields(options_of(verb))} - taken
    below: dict[str, Any] = {"output_dir": "plan", **({"use_cpu": True} if "use_cpu" in taken else {})}
    options, config = parse("plan", [PlanOptions, config_class], arguments, below, ignored)
    options.method = name
    if options.device != "cpu" and value_of("checkpoint_blocks", arguments) in (None, "auto"):
        config.checkpoint_blocks = "frozen"  # the meaning of auto on an accelerator
    try:
        with contextlib.redirect_stdout(sys.stderr):  # a trainer's notes are no part of the plan
            planned = plan(options, method, config)
    except (NotImplementedError, RuntimeError) as error:
        what = str(error).strip().splitlines()[0][:120]
        raise UsageError(
            f"{name} on {options.model} cannot be planned: its computation depends on values, as that of a mixture of "
            f"experts ({what})"
        ) from error
    as_json = options.format == "json"
    print(json.dumps(as_dict(planned, options), indent=1) if as_json else "\n".join(lines(planned, options)))


def _analyze(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("--help", "-h"):
        return print("tunevax analyze sink --option value: sink divergence by head and layer (arXiv 2602.05228)")
    what, *rest = arguments
    if what != "sink":
        raise unknown("analysis", what, ["sink"])
    quiet()
    from tunevax.finetuning.analyze import SinkOptions, analyze_sink

    (options,) = parse("analyze sink", [SinkOptions], rest)
    out = analyze_sink(options, _command("analyze", arguments))
    for model in read_object(out / SINK)["models"]:
        print(f"{model['label']}: {model['positive_heads']} of {model['heads']} heads attend more to the sink on harm")
    print(f"next: tunevax report {short(out)}; sink analysis: {short(out)}")


def _score(arguments: list[str]) -> None:
    quiet()
    from tunevax.scoring.score import ScoreOptions, score

    (options,) = parse("score", [ScoreOptions], arguments or ["--help"])
    out = score(options, _command("score", arguments))
    print(f"scored, {_worst(out)}; results: {short(out)}")


def _judge(arguments: list[str]) -> None:
    quiet()
    from tunevax.scoring.rejudge import JudgeOptions, rejudge

    run, *rest = arguments or ["--help"]
    if run.startswith("-") and run not in ("--help", "-h"):
        raise UsageError("`tunevax judge` takes a run folder first: tunevax judge RUN --judges JUDGE --output-dir OUT")
    (options,) = parse("judge RUN", [JudgeOptions], rest if rest else ["--help"])
    out = rejudge(run, options, _command("judge", arguments))
    print(f"judged again, {_worst(out)}; results: {short(out)}")


def _audit(arguments: list[str]) -> None:
    if "--compare" in arguments:
        return _compare(arguments)
    quiet()
    from tunevax.audit.audit import run
    from tunevax.audit.plan import AuditOptions
    from tunevax.audit.protocol import load_protocol
    from tunevax.report import write_report

    protocol = load_protocol(value_of("protocol", arguments) or AuditOptions.protocol)
    (options,) = parse("audit", [AuditOptions], arguments or ["--help"], protocol.scoring)
    out = run(options, _command("audit", arguments))
    if out is None:  # a dry run
        return
    record, page = read_run(out), out / "report.html"
    print("\n".join(write_report([out], page).headline))
    if failed := record["failed"]:
        raise RunError(
            f"{len(failed)} of {record['cells']} cells failed, the first with {failed[0]['error']}; the same "
            f"command runs them again; the rest is in {page}"
        )
    print(f"audit: {short(page)}")


def _compare(arguments: list[str]) -> None:
    from tunevax.evidence.measure import compare

    parser = Parser(prog="tunevax audit", description="Two audits side by side, if they can be compared.")
    parser.add_argument("--compare", nargs=2, type=Path, required=True, metavar=("A", "B"), help="audit run folders")
    print(compare(*parser.parse_args(arguments).compare))


def _list(arguments: list[str]) -> None:
    about = "All methods, attacks, judges and protocols, with a line and the paper of each."
    parser = Parser(prog="tunevax list", description=about)
    parser.add_argument("what", nargs="?", help=f"one of {', '.join(LISTS)}; default all")
    what = parser.parse_args(arguments).what
    if what is not None and what not in LISTS:
        raise unknown("list", what, LISTS)
    for name in [what] if what else LISTS:
        print(f"{name}\n" + "\n".join(LISTS[name]()) + "\n")


def _protocols() -> list[str]:
    from tunevax.audit.protocol import SHIPPED
    from tunevax.yaml_files import read_yaml

    files = sorted(SHIPPED.glob("*.yaml"))
    width = max(len(file.stem) for file in files)
    return [f"  {file.stem:{width}}  {' '.join(read_yaml(file)['about'].split())}" for file in files]


def lines_of(folder: str) -> list[str]:
    """A line for each method of a package: name, first sentence of the docstring, and paper."""
    known, lines = methods(folder), []
    width = max(map(len, known))
    for name, target in known.items():
        try:
            spec = importlib.util.find_spec(target.partition(":")[0])
        except ImportError:  # of a package around the module
            spec = None
        if spec is None or spec.origin is None:
            lines.append(f"  {name:{width}}  cannot be imported from {target}")
            continue
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
        first = " ".join((ast.get_docstring(tree) or "").partition("\n\n")[0].split())
        summary = first[: end.start() + 1] if (end := re.search(r"(?<!al)\. ", first)) else first
        paper = next(filter(None, map(_paper, ast.walk(tree))), "")
        number = re.search(r"\d{4}\.\d{5}", paper)
        shown = f" [{paper}]" if paper and not (number and number[0] in summary) else ""
        lines.append(f"  {name:{width}}  {summary}{shown}")
    return lines


def _paper(node: ast.AST) -> str:
    """The string that a class names as its `paper`."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    named = any(isinstance(target, ast.Name) and target.id == "paper" for target in targets)
    value = getattr(node, "value", None)
    return str(value.value) if named and isinstance(value, ast.Constant) else ""


PACKAGES = {"curate": "curation", "align": "alignment", "finetune": "finetuning", "restore": "restoration"}
PACKAGES |= {"attacks": "attacks", "judges": "scoring.judges"}
LISTS: dict[str, Callable[[], list[str]]] = {n: partial(lines_of, f"tunevax.{p}") for n, p in PACKAGES.items()}
LISTS["protocols"] = _protocols


def _report(arguments: list[str]) -> None:
    from tunevax.report import FORMATS, write_report

    parser = Parser(prog="tunevax report", description="One self-contained page from run folders.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders of any verb")
    parser.add_argument("--output", type=Path, default=None, help="the file to write; default RUN/report.FORMAT")
    formats = "html (default), md (sentences and tables) or json (numbers)"
    parser.add_argument("--format", default="html", metavar="FORMAT", help=formats)
    options = parser.parse_args(arguments or ["--help"])
    if options.format not in FORMATS:
        raise unknown("format", options.format, FORMATS)
    output = options.output or options.runs[0] / f"report.{options.format}"
    print("\n".join(write_report(options.runs, output, options.format).headline))
    print(f"report: {short(output)}")


def _demo(arguments: list[str]) -> None:
    parser = Parser(
        prog="tunevax demo", description="Align, attack and report on the organism, in three to six minutes."
    )
    parser.add_argument("--output-dir", type=Path, default=Path("demo"), help="folder for the runs and the report")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier demo in that folder")
    options = parser.parse_args(arguments)
    quiet()
    from tunevax.demo import demo

    demo(options.output_dir, options.overwrite)


VERBS = {
    "demo": Verb("demo", "the whole workflow on a tiny model, in three to six minutes", _demo),
    "list": Verb("list", "the methods, attacks and protocols, with a line and the paper of each", _list),
    "plan": Verb("plan --method METHOD --model REF --gpu 24GB", "the memory and the cost of a step, estimated", _plan),
    "curate": Verb("curate METHOD --model REF --safety-data SRC --validation-data SRC --keep 0.4 --output-dir OUT",
                   "choose the alignment rows to keep", partial(run_method, "curate")),
    "align": Verb("align METHOD --model REF --safety-data SRC --output-dir OUT",
                  "harden a model before its release", partial(run_method, "align")),
    "finetune": Verb("finetune METHOD --model RUN --task-data SRC --safety-data SRC --output-dir OUT",
                     "run a customer's job with a defence", partial(run_method, "finetune")),
    "restore": Verb("restore METHOD --model RUN --output-dir OUT",
                    "repair a fine-tuned model, without training", partial(run_method, "restore")),
    "attack": Verb("attack METHOD --model RUN --safety-data SRC --task-data SRC --output-dir OUT",
                   "attack it and a control in one way, and score along the way", partial(run_method, "attack")),
    "audit": Verb("audit --model RUN --control RUN --protocol quick --output-dir OUT",
                  "a grid of attacks with several seeds, and a report on how much a defence helps", _audit),
    "score": Verb("score --model REF --safety-data SRC --output-dir OUT", "score a model as it is", _score),
    "judge": Verb("judge RUN --judges JUDGE --output-dir OUT", "judge the stored responses of a run again", _judge),
    "analyze": Verb("analyze sink --model RUN --safety-data SRC --output-dir OUT",
                    "find the attention heads that attend to the sink on harmful text", _analyze),
    "report": Verb("report RUN [RUN ...]", "one HTML page from the results, or Markdown, or JSON", _report),
}  # fmt: skip


def overview() -> str:
    """What `tunevax --help` prints."""
    purpose = "hardens open-weight language models against harmful fine-tuning, and measures how much it helped"
    lines = [f"tunevax {purpose}.", ""]
    for verb in VERBS.values():
        usage = f"  tunevax {verb.usage}"
        lines += [f"{usage:38}{verb.summary}"] if len(usage) < 37 else [usage, f"{'':38}{verb.summary}"]
    return "\n".join(lines) + (
        "\n\nREF is a hub id, a model folder, a run folder, a GGUF file, or organism (the built-in tiny model);\n"
        "SRC is a JSONL, JSON, CSV or parquet file, a hub id, organism, or proxy:geography. `tunevax VERB` lists the\n"
        "methods of a verb, `tunevax VERB METHOD --help` its options. Every option can be in a YAML file:\n"
        "--config FILE. Add --debug to see a traceback."
    )


def _finish(done: Callable[[], list[str]]) -> None:
    """Print the lines on the main process. Under a launcher the process group is destroyed first: at exit, with a
    trainer alive, that sometimes aborts."""
    import torch

    from tunevax.environment import is_main_process

    main = is_main_process()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gc.collect()
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if main:
        print("\n".join(done()))


def _command(verb: str, arguments: list[str]) -> str:
    return shlex.join(["tunevax", verb, *arguments])


def _rows_used(out: Path) -> str:
    """The number of rows that a run used, by role, and how many are distinct."""
    data = read_run(out)["data"]
    repeats = [f", {e['distinct']} distinct" if e["distinct"] < e["rows"] else "" for e in data]
    return "; ".join(f"{e['role']} {e['rows']} rows{more}" for e, more in zip(data, repeats, strict=True))


def _worst(out: Path) -> str:
    """The worst harmful score of each model in a run's results, by the lead judge."""
    worst: dict[str, tuple[float, str]] = {}
    for row in read_lines(out / RESULTS):
        worst[row["model"]] = max(worst.get(row["model"], (0.0, "")), harmful(row["scores"]))
    return "worst harmful score " + ", ".join(f"{m} {v:.0%} ({j})" for m, (v, j) in worst.items())


def short(path: Path) -> Path:
    """The path relative to the working directory, if below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
