"""The verbs of the command line: a table, and what each of them prints when it is done."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tunevax.cli import listing
from tunevax.cli.listing import lines_of
from tunevax.cli.options import Parser, parse, print_help, value_of
from tunevax.errors import RunError, UsageError, unknown
from tunevax.methods import attribute, load_method, methods
from tunevax.quiet import quiet
from tunevax.records import RESULTS, SINK, harmful, read_lines, read_object, read_run


class Verb(NamedTuple):
    """A verb: what is typed behind it, what it does in one line, and its function."""

    usage: str
    summary: str
    run: Callable[[list[str]], None]


class MethodVerb(NamedTuple):
    """A verb that takes a method first.

    Attributes:
        folder: of its methods, for `tunevax.methods`.
        options, function: `module:attribute` of what it takes besides the method's options, and of what runs it.
        done: the lines to print, from the run folder, the method's name and its options.
    """

    folder: str
    options: str
    function: str
    done: Callable[[Path, str, Any], list[str]]


def _curated(out: Path, name: str, _config: Any) -> list[str]:
    record = _record(out)
    dropped = ", ".join(f"{n} {why}" for why, n in record["dropped"].items()) or "none"
    line = f"{name} kept {record['kept']} of {record['data'][0]['rows']} rows; dropped: {dropped}"
    if "agreement" in record:
        line += "; rank agreement with the target model {spearman:.2f} (Spearman)".format(**record["agreement"])
    lines = [line]
    if n := record["elsewhere"]:
        lines.append(f"{n} more rows are for attack and evaluation; the source's option split=all takes them")
    if n := record.get("corrupted_kept", record.get("spoilt_kept")):  # its name in older runs
        lines.append(f"{n} of the kept rows are marked as corrupted; take them out before you train")
    command = f"tunevax align METHOD --model REF --safety-data {short(out)} --output-dir OUT"
    return [*lines, f"next: {command}; scores and rows: {short(out)}"]


def _aligned(out: Path, name: str, config: Any) -> list[str]:
    from tunevax.alignment.held_out import sentences

    return [*sentences(_record(out)["held_out"]), *_trained(out, name, config)]


def _trained(out: Path, name: str, config: Any) -> list[str]:
    lines = []
    if screened := _record(out).get("screen"):
        flagged, dropped = screened["flagged"], screened["dropped"]
        lines.append(f"data screening flagged {flagged} rows and dropped {dropped}: {short(out)}/screen.jsonl")
    kind = "model" if config.full_weights else "adapter"
    return [*lines, f"{name} done ({_rows_used(out)}), {kind}: {short(out)}"]


def _restored(out: Path, name: str, _config: Any) -> list[str]:
    return [f"{name} done; next: tunevax report {short(out)}; written: {short(out)}"]


def _attacked(out: Path, name: str, _config: Any) -> list[str]:
    return [
        f"attack {name} done ({_rows_used(out)}), {_worst(out)}",
        f"next: tunevax report {out} --output report.html; results: {short(out)}",
    ]


METHOD_VERBS = {
    "curate": MethodVerb(
        "tunevax.curation", "tunevax.curation.curate:CurateOptions", "tunevax.curation.curate:curate", _curated
    ),
    "align": MethodVerb(
        "tunevax.alignment", "tunevax.alignment.align:AlignOptions", "tunevax.alignment.align:align", _aligned
    ),
    "finetune": MethodVerb(
        "tunevax.finetuning", "tunevax.finetuning.finetune:FinetuneOptions", "tunevax.finetuning.finetune:finetune",
        _trained,
    ),
    "restore": MethodVerb(
        "tunevax.restoration", "tunevax.restoration.restore:RestoreOptions", "tunevax.restoration.restore:restore",
        _restored,
    ),
    "attack": MethodVerb(
        "tunevax.attacks", "tunevax.attacks.attack:AttackOptions", "tunevax.attacks.attack:attack", _attacked
    ),
}  # fmt: skip


def run_method(verb: str, arguments: list[str]) -> None:
    """`tunevax VERB METHOD --option value`."""
    folder, options_class, function, done = METHOD_VERBS[verb]
    known = methods(folder)
    if not arguments or arguments[0] in ("--help", "-h"):
        print(f"tunevax {verb} METHOD --option value; METHOD is one of\n")
        print("\n".join(lines_of(folder)))
        print(f"\n`tunevax {verb} METHOD --help` shows its options.")
        return
    if arguments[0].startswith("-"):
        raise UsageError(f"`tunevax {verb}` takes a method first; known: {', '.join(known)}")
    name = arguments[0].replace("_", "-")
    if name not in known:
        raise unknown("method", arguments[0], known)
    quiet()
    method = load_method(folder, name)
    config_class = getattr(method, "config_class", method)
    options, config = parse(f"{verb} {name}", [attribute(options_class), config_class], arguments[1:])
    trainer = [method] if config_class is not method else []
    out = attribute(function)(*trainer, name, options, config, _command(verb, arguments))
    _finish(lambda: done(out, name, config))


def _plan(arguments: list[str]) -> None:
    from tunevax.planning.plan import FOLDERS, PlanOptions

    if not arguments or "--help" in arguments or "-h" in arguments:
        print_help("plan", [PlanOptions])
        print("\nand every option of the method: tunevax align METHOD --help, and likewise of the other verbs.")
        return
    given = value_of("method", arguments)
    if given is None:
        raise UsageError("--method is missing; name one that align, finetune, curate or restore has, such as t-vaccine")
    name = given.replace("_", "-")
    folders = {n: folder for folder in reversed(FOLDERS) for n in methods(folder)}
    if name not in folders:
        raise unknown("method", given, folders)
    quiet()
    from tunevax.planning.plan import as_dict, lines, plan

    method = load_method(folders[name], name)
    config_class = getattr(method, "config_class", method)
    # What a command says of data makes no difference here: `align METHOD` becomes `plan --method METHOD`, and no more.
    verb = next(v for v in METHOD_VERBS.values() if v.folder == folders[name])
    taken = {f.name for cls in (PlanOptions, config_class) for f in dataclasses.fields(cls)}
    ignored = {f.name for f in dataclasses.fields(attribute(verb.options))} - taken
    below: dict[str, Any] = {"output_dir": "plan"}
    if "use_cpu" in taken:
        below["use_cpu"] = True  # where it would run is not here
    options, config = parse("plan", [PlanOptions, config_class], arguments, below, ignored)
    options.method = name
    if options.device != "cpu" and value_of("checkpoint_blocks", arguments) in (None, "auto"):
        config.checkpoint_blocks = "frozen"  # what auto is on an accelerator
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what a trainer notes is no part of the plan
            planned = plan(options, method, config)
    except (NotImplementedError, RuntimeError) as error:
        what = str(error).strip().splitlines()[0][:120]
        raise UsageError(
            f"{name} on {options.model} cannot be planned: what it computes depends on values, as a mixture of experts "
            f"does ({what})"
        ) from error
    as_json = options.format == "json"
    print(json.dumps(as_dict(planned, options), indent=1) if as_json else "\n".join(lines(planned, options)))


def _analyze(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("--help", "-h"):
        print("tunevax analyze sink --option value: sink divergence by head and layer (arXiv 2602.05228)")
        return
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
        _compare(arguments)
        return
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
    print("\n".join(write_report([out], out / "report.html").headline))
    record = _record(out)
    if failed := record["failed"]:
        raise RunError(
            f"{len(failed)} of {record['cells']} cells failed, the first with {failed[0]['error']}; the same "
            f"command runs them again; the rest is in {out / 'report.html'}"
        )
    print(f"audit: {short(out / 'report.html')}")


def _compare(arguments: list[str]) -> None:
    from tunevax.evidence.compare import compare

    parser = Parser(prog="tunevax audit", description="Two audits side by side, if they can be compared.")
    parser.add_argument("--compare", nargs=2, type=Path, required=True, metavar=("A", "B"), help="audit run folders")
    print(compare(*parser.parse_args(arguments).compare))


def _report(arguments: list[str]) -> None:
    from tunevax.report import FORMATS, write_report

    parser = Parser(prog="tunevax report", description="One self-contained page from run folders.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders of any verb")
    parser.add_argument("--output", type=Path, default=None, help="the file to write; default RUN/report.FORMAT")
    parser.add_argument(
        "--format", default="html", metavar="FORMAT", help="html (default), md (sentences and tables) or json (numbers)"
    )
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
    "demo": Verb("demo", "the whole of it on a tiny model, in three to six minutes", _demo),
    "list": Verb("list", "the methods, attacks and protocols, with a line and the paper of each", listing.show),
    "plan": Verb(
        "plan --method METHOD --model REF --gpu 24GB", "the memory and the cost of a step before a GPU is rented", _plan
    ),
    "curate": Verb(
        "curate METHOD --model REF --safety-data SRC --validation-data SRC --keep 0.4 --output-dir OUT",
        "choose the alignment rows worth keeping",
        lambda arguments: run_method("curate", arguments),
    ),
    "align": Verb(
        "align METHOD --model REF --safety-data SRC --output-dir OUT",
        "harden a model before its release",
        lambda arguments: run_method("align", arguments),
    ),
    "finetune": Verb(
        "finetune METHOD --model RUN --task-data SRC --safety-data SRC --output-dir OUT",
        "run a customer's job with a defence beside it",
        lambda arguments: run_method("finetune", arguments),
    ),
    "restore": Verb(
        "restore METHOD --model RUN --output-dir OUT",
        "repair a fine-tuned model, without training",
        lambda arguments: run_method("restore", arguments),
    ),
    "attack": Verb(
        "attack METHOD --model RUN --safety-data SRC --task-data SRC --output-dir OUT",
        "attack it in one way, beside a control, and score along the way",
        lambda arguments: run_method("attack", arguments),
    ),
    "audit": Verb(
        "audit --model RUN --control RUN --protocol quick --output-dir OUT",
        "a grid of attacks with several seeds, and a report on what a defence is worth",
        _audit,
    ),
    "score": Verb("score --model REF --safety-data SRC --output-dir OUT", "score a model as it is", _score),
    "judge": Verb("judge RUN --judges JUDGE --output-dir OUT", "judge the stored answers of a run again", _judge),
    "analyze": Verb(
        "analyze sink --model RUN --safety-data SRC --output-dir OUT",
        "look for the attention heads that turn to harmful text",
        _analyze,
    ),
    "report": Verb("report RUN [RUN ...]", "one HTML page from the results, or Markdown, or JSON", _report),
}


def overview() -> str:
    """What `tunevax --help` prints."""
    purpose = "hardens open-weight language models against harmful fine-tuning, and measures how much it helped"
    lines = [f"tunevax {purpose}.", ""]
    for verb in VERBS.values():
        usage = f"  tunevax {verb.usage}"
        lines += [f"{usage:38}{verb.summary}"] if len(usage) < 37 else [usage, f"{'':38}{verb.summary}"]
    return "\n".join(lines) + (
        "\n\nREF is a hub id, a model folder, a run folder, or organism (the built-in tiny model); SRC is a JSONL, "
        "JSON, CSV or\nparquet file, a hub id, or organism. `tunevax VERB` lists the methods of a verb, `tunevax VERB "
        "METHOD --help`\nits options. Every option can stand in a YAML file: --config FILE. Add --debug to see a "
        "traceback."
    )


# --- what the person sees ------------------------------------------------------------------------------------------


def _finish(done: Callable[[], list[str]]) -> None:
    """Print the lines on the main process. Under a launcher, part in order before that: a process group torn down at
    exit, with a trainer alive, aborts now and then."""
    import gc

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


def _record(out: Path) -> dict[str, Any]:
    return read_run(out)


def _rows_used(out: Path) -> str:
    """The rows a run used, by role, and where they repeat."""
    parts = []
    for entry in _record(out)["data"]:
        repeats = f", {entry['distinct']} distinct" if entry["distinct"] < entry["rows"] else ""
        parts.append(f"{entry['role']} {entry['rows']} rows{repeats}")
    return "; ".join(parts)


def _worst(out: Path) -> str:
    """The worst harmful score of each model in a results file, by the judge that leads, in words."""
    worst: dict[str, tuple[float, str]] = {}
    for row in read_lines(out / RESULTS):
        worst[row["model"]] = max(worst.get(row["model"], (0.0, "")), harmful(row["scores"]))
    return "worst harmful score " + ", ".join(f"{m} {v:.0%} ({j})" for m, (v, j) in worst.items())


def short(path: Path) -> Path:
    """Relative to where the person is, if below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
