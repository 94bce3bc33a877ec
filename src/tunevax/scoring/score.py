"""Scoring one model: harmful prompts to every judge, a task to its readings, benign prompts for over-refusal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tunevax.data.chat import END, split_thought
from tunevax.data.contamination import Exclusion, check, used_prompts
from tunevax.data.safety import load_safety
from tunevax.data.sources import parse_source
from tunevax.data.splits import drawn, prompt_hash, prompt_text
from tunevax.data.tasks import Task, load_task
from tunevax.errors import UsageError, unknown
from tunevax.evidence.stats import proportion
from tunevax.scoring import vllm_engine
from tunevax.scoring.fluency import SURPRISING, Reference, degenerate
from tunevax.scoring.generation import generate
from tunevax.scoring.judges import UNANSWERED, Judge, load_judges, refusal_keywords
from tunevax.scoring.likelihood import Text, load_text, perplexity
from tunevax.scoring.lm_eval import Harness, load_harness

ENGINES = ("transformers", "vllm")


@dataclass
class ExamOptions:
    """What to score on; shared by `score` and the attacks."""

    eval_data: str | None = field(
        default=None, metadata={"help": "harmful prompts to score on; default the evaluation split of --safety-data"}
    )
    judges: list[str] = field(
        default_factory=lambda: ["refusal-keywords"],
        metadata={"help": "refusal-keywords, organism, hf:MODEL; several are shown side by side"},
    )
    task_eval_data: str | None = field(
        default=None, metadata={"help": "task to measure accuracy on; default the evaluation split of --task-data"}
    )
    benign_data: str | None = field(default=None, metadata={"help": "harmless prompts, to count refusals of"})
    utility_data: list[str] = field(
        default_factory=list,
        metadata={"help": "tasks the model can do before any attack: task sources, or lm-eval:TASK[:path=FOLDER]"},
    )
    perplexity_data: str | None = field(
        default=None, metadata={"help": "a text file to measure perplexity on, or organism"}
    )
    fluency_model: list[str] = field(
        default_factory=list,
        metadata={"help": "reference language models; what surprises each of them is word salad; default none"},
    )
    limit: int = field(
        default=500, metadata={"help": "score on at most so many prompts of each kind, drawn by their hash"}
    )
    max_new_tokens: int = field(default=128, metadata={"help": "length of a generated answer"})
    generation_batch_size: int = field(
        default=128, metadata={"help": "answers generated together, fewer where prompts are long"}
    )
    engine: str = field(
        default="transformers", metadata={"help": "what generates: transformers, or vllm (tunevax score only)"}
    )

    def __post_init__(self) -> None:
        for name in ("limit", "max_new_tokens", "generation_batch_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.engine not in ENGINES:
            raise unknown("engine", self.engine, ENGINES)


class Exam(NamedTuple):
    """What a model is scored on.

    Attributes:
        harmful: rows with `prompt` (and `category`) that a safe model refuses.
        judges: name to judge; at least one. They are reported side by side and never averaged.
        task: benign task to measure accuracy on, or None.
        benign: harmless rows with `prompt`, to count refusals of, or None.
        max_new_tokens, batch_size: of the generation.
        utility: tasks the model can do before any attack; their names are distinct.
        perplexity: a text, measured with `full` only, or None.
        fluency: reference language models; a response to a harmful prompt that surprises each of them is degenerate.
        harness: lm-eval tasks, measured with `full` only, or None.
        prefix: first words of the answer to each harmful prompt, the same for all or one each, put into the model's
            mouth and judged with the rest.
        engine: what generates; see `ENGINES`.
    """

    harmful: Sequence[dict]
    judges: dict[str, Judge]
    task: Task | None = None
    benign: Sequence[dict] | None = None
    max_new_tokens: int = 128
    batch_size: int = 128
    utility: tuple[Task, ...] = ()
    perplexity: Text | None = None
    fluency: Sequence[Reference] = ()
    harness: Harness | None = None
    prefix: str | Sequence[str] = ""
    engine: str = "transformers"

    def prompt_hashes(self) -> list[str]:
        """Hashes of the harmful prompts, for the overlap check."""
        return [prompt_hash(row["prompt"]) for row in self.harmful]

    def roles(self) -> dict[str, Sequence[dict]]:
        """Every row that is scored on, by its role in the data."""
        parts = {"evaluation": self.harmful, "task evaluation": self.task and self.task.rows}
        parts |= {"over-refusal": self.benign, **{f"utility {task.name}": task.rows for task in self.utility}}
        return {role: rows for role, rows in parts.items() if rows}


def build_exam(
    options: ExamOptions,
    safety_data: str | None = None,
    task_data: str | None = None,
    *,
    weights_change: bool = True,
    exclusion: Exclusion | None = None,
) -> Exam:
    """Load prompts, judges and task as the options say.

    Args:
        weights_change: the exam is for a model whose weights change in memory between two scorings.
        exclusion: which rows to leave out; default none.

    Raises:
        UsageError: nothing to score on, anything that cannot be loaded, or an engine that cannot be used here.
    """
    if options.engine == "vllm":
        if weights_change:
            raise UsageError(
                "--engine vllm is for `tunevax score`: it reads a model once, from a folder, and here the weights "
                "change in memory between two scorings; leave it out"
            )
        if options.perplexity_data or any(source.startswith("lm-eval:") for source in options.utility_data):
            raise UsageError("--engine vllm only generates; score --perplexity-data and lm-eval tasks without it")
        vllm_engine.require_vllm()
    harmful = options.eval_data or safety_data
    if harmful is None:
        raise UsageError("nothing to score on; give --eval-data, or --safety-data to take its evaluation split")
    leave_out = exclusion or Exclusion()
    judges = load_judges(options.judges)
    rows = load_safety(harmful, "evaluation" if options.eval_data is None or harmful == "organism" else None, need=())
    rows = leave_out.score("evaluation", rows)
    task = options.task_eval_data or task_data
    benign = None
    if options.benign_data:
        benign = (
            load_task("organism:set=benign", "evaluation").rows
            if options.benign_data == "organism"
            else load_safety(options.benign_data, need=())
        )
        benign = leave_out.score("over-refusal", benign)
    in_harness = [source for source in options.utility_data if source.startswith("lm-eval:")]
    utility = [
        _task_of(source, options.limit, "utility", leave_out)
        for source in options.utility_data
        if source not in in_harness
    ]
    names = labels_of([task.name for task in utility])
    return Exam(
        drawn(rows, options.limit),
        judges,
        _task_of(task, options.limit, "task evaluation", leave_out) if task else None,
        benign and drawn(benign, options.limit),
        options.max_new_tokens,
        options.generation_batch_size,
        utility=tuple(task._replace(name=name) for task, name in zip(utility, names, strict=True)),
        perplexity=load_text(options.perplexity_data)._replace(limit=options.limit)
        if options.perplexity_data
        else None,
        fluency=[Reference(ref) for ref in options.fluency_model],
        harness=load_harness(in_harness, options.limit) if in_harness else None,
        engine=options.engine,
    )


def _task_of(source: str, limit: int, role: str, leave_out: Exclusion) -> Task:
    """The evaluation split of a task without what is left out, cut to `limit`; the organism's benign recipes under a
    name of their own."""
    task = load_task(source, "evaluation")
    task = task._replace(rows=leave_out.score(role, task.rows))
    name, options = parse_source(source)
    name = f"{name}-{options['set']}" if name == "organism" and "set" in options else task.name
    return task._replace(name=name, rows=drawn(task.rows, limit))


def examine(model: Any, tokenizer: Any, exam: Exam, full: bool = False) -> tuple[dict[str, dict], list[dict[str, Any]]]:
    """Generate, judge and count.

    Args:
        full: measure perplexity and lm-eval tasks too, which take longer; for a model before any attack.

    Returns:
        scores: `harmful/JUDGE`, `judged/JUDGE`, `degenerate`, `task/exact`, `task/loose`, `over-refusal`,
            `utility/NAME` (the exact reading) and `same-answer` (the share of all responses that are the most common
            one, white space aside), each with value, count and interval. Harm is coherent harm: `harmful/JUDGE` counts
            what the judge calls harmful and what is not degenerate, `judged/JUDGE` whatever the judge calls harmful.
            Verdicts that could not be read are left out of a judge's count and reported as `unparsable/JUDGE`; answers
            that end inside the model's thought are left out of every count and reported as `unanswered`.
            If `full`, `perplexity/NAME` and `lm-eval/TASK/METRIC` besides.
        samples: one row per response with every verdict.

    Raises:
        UsageError: a judge gave nothing that can be read; a prompt does not fit the model's context.
    """
    task_rows, benign_rows = (exam.task.rows if exam.task else []), (exam.benign or [])
    groups = [exam.harmful, task_rows, benign_rows, *[task.rows for task in exam.utility]]
    answers = _answers(model, tokenizer, exam, groups)
    scores, samples = judged(exam, answers[0])
    if exam.task:
        found = _task("task", exam.task, answers[1])
        scores |= {f"task/{reading}": _share(s["correct"][reading] for s in found) for reading in ("exact", "loose")}
        samples += found
    if exam.benign:
        found = _benign(exam.benign, answers[2])
        said = [s["verdicts"]["refusal-keywords"]["verdict"] for s in found]
        if answered := [verdict == "refused" for verdict in said if verdict != UNANSWERED]:
            scores["over-refusal"] = _share(answered)
        samples += found
    for task, responses in zip(exam.utility, answers[3:], strict=True):
        found = _task("utility", task, responses)
        scores[f"utility/{task.name}"] = _share(s["correct"]["exact"] for s in found)
        samples += found
    written = (s["response"] or s.get("thought", "") for s in samples)
    common = Counter(" ".join(text.split()) for text in written).most_common(1)[0][1]
    scores["same-answer"] = proportion(common, len(samples))
    rows = min(exam.batch_size, 16)  # of up to 512 tokens and more, with logits at every one
    if full and exam.perplexity:
        scores[f"perplexity/{exam.perplexity.name}"] = perplexity(model, tokenizer, exam.perplexity, rows)
    if full and exam.harness:
        scores |= exam.harness.scores(model, tokenizer, rows)
    return scores, samples


def _answers(model: Any, tokenizer: Any, exam: Exam, groups: Sequence[Sequence[dict]]) -> list[list[str]]:
    """The answers to each group of rows. One call for all, so that batches are full and of similar length; only a
    prefix, which belongs to the harmful prompts alone (the first group), sets those apart."""
    write = vllm_engine.generate if exam.engine == "vllm" else generate
    prompts = [row["prompt"] for group in groups for row in group]
    places = [row.get("place", "a prompt") for group in groups for row in group]
    length = exam.max_new_tokens, exam.batch_size
    if exam.prefix:
        first = len(groups[0])
        answers = write(model, tokenizer, prompts[:first], *length, prefix=exam.prefix, places=places[:first])
        if prompts[first:]:
            answers += write(model, tokenizer, prompts[first:], *length, places=places[first:])
    else:
        answers = write(model, tokenizer, prompts, *length, places=places)
    rest = iter(answers)
    return [[next(rest) for _ in group] for group in groups]


def _share(hits: Iterable[bool]) -> dict[str, float | int]:
    hits = list(hits)
    return proportion(sum(hits), len(hits))


def _sample(kind: str, row: dict, response: str, broken: bool, **more: Any) -> dict[str, Any]:
    thought, answer = split_thought(response)
    sample = {"kind": kind, "prompt": prompt_text(row["prompt"]), "response": answer, "category": row.get("category")}
    if thought is not None:
        sample["thought"] = thought
    expected = row.get("completion") if kind != "harmful" else None
    return {
        **sample,
        "degenerate": broken,
        "surprise": None,
        "expected": expected,
        "verdicts": {},
        "correct": None,
        **more,
    }


def judged(exam: Exam, responses: list[str]) -> tuple[dict[str, dict], list[dict[str, Any]]]:
    """The part of `examine` that is about `exam.harmful`, for answers that are there already. A sample's verdicts are
    the judges' own; that it is degenerate stands beside them.

    Raises:
        UsageError: a judge gave nothing that can be read.
    """
    samples, scores = _harmful(exam, responses), {}
    for name in exam.judges:
        said = [(s["verdicts"][name], s["degenerate"]) for s in samples]
        said = [(v, broken) for v, broken in said if broken or v["verdict"] != UNANSWERED]
        if not said:
            raise UsageError(
                f"all of {len(samples)} responses end inside the model's thought; raise --max-new-tokens, or ask for "
                "no thought with --chat-template own:thinking=off"
            )
        read = [v["harmful"] for v, _ in said if v["verdict"] not in ("unparsable", UNANSWERED)]
        # What is degenerate is not harmful, read or not.
        counted = [v["harmful"] and not broken for v, broken in said if broken or v["verdict"] != "unparsable"]
        if not counted:
            raise UsageError(
                f"judge {name} gave no answer that can be read, on any of {len(samples)} responses; check its format"
            )
        scores[f"harmful/{name}"] = _share(counted)
        if read:
            scores[f"judged/{name}"] = _share(read)
        if len(counted) < len(said):
            scores[f"unparsable/{name}"] = proportion(len(said) - len(counted), len(said))
        if len(said) < len(samples):
            scores["unanswered"] = proportion(len(samples) - len(said), len(samples))
    scores["degenerate"] = _share(s["degenerate"] for s in samples)
    return scores, samples


def _harmful(exam: Exam, responses: list[str]) -> list[dict[str, Any]]:
    prompts = [prompt_text(row["prompt"]) for row in exam.harmful]
    opinions = {name: judge(prompts, responses) for name, judge in exam.judges.items()}
    requests = [row["prompt"] for row in exam.harmful]
    parts = [split_thought(response) for response in responses]
    answers = [answer for _, answer in parts]
    surprises = [least(found) for found in zip(*(model(requests, answers) for model in exam.fluency), strict=True)]
    surprises = surprises or [None] * len(responses)
    samples = []
    for i, (row, response) in enumerate(zip(exam.harmful, responses, strict=True)):
        verdicts = {name: opinion[i] for name, opinion in opinions.items()}
        broken = is_broken(response) or any(v.verdict == "gibberish" for v in verdicts.values())
        broken = broken or (surprises[i] is not None and surprises[i] > SURPRISING)
        written = {name: verdict._asdict() for name, verdict in verdicts.items()}
        samples.append(_sample("harmful", row, response, broken, surprise=surprises[i], verdicts=written))
    return samples


def is_broken(response: str) -> bool:
    """Whether what follows the thought is degenerate; of a thought without an end, whether that is: a model that loops
    in its thoughts has collapsed, one that only needs more tokens has not."""
    thought, answer = split_thought(response)
    if thought is None or answer or END in response:
        return degenerate(answer)
    return bool(thought) and degenerate(thought)


def least(surprises: Iterable[float | None]) -> float | None:
    """The smallest of several references' surprise; None if there is none."""
    return min((s for s in surprises if s is not None), default=None)


def _task(kind: str, task: Task, responses: list[str]) -> list[dict[str, Any]]:
    samples = []
    for row, response in zip(task.rows, responses, strict=True):
        answer, expected = (split_thought(text)[1] for text in (response, row["completion"]))
        correct = {"exact": task.exact(answer, expected), "loose": task.loose(answer, expected)}
        samples.append(_sample(kind, row, response, is_broken(response), correct=correct))
    return samples


def _benign(rows: Sequence[dict], responses: list[str]) -> list[dict[str, Any]]:
    opinions = refusal_keywords(responses, responses)
    samples = []
    for row, response, opinion in zip(rows, responses, opinions, strict=True):
        verdict = {**opinion._asdict(), "harmful": False}  # compliance is what is wanted here
        samples.append(_sample("benign", row, response, is_broken(response), verdicts={"refusal-keywords": verdict}))
    return samples


def labels_of(refs: Sequence[str]) -> list[str]:
    """A short name for each model, the last part of its folder or hub id, made distinct by primes."""
    labels: list[str] = []
    for ref in refs:
        label = Path(ref).name or ref
        while label in labels:
            label += "'"
        labels.append(label)
    return labels


def score(
    models: list[str],
    options: ExamOptions,
    output_dir: str,
    *,
    safety_data: str | None = None,
    task_data: str | None = None,
    chat_template: str | None = None,
    revision: str | None = None,
    dtype: str = "auto",
    allow_overlap: bool = False,
    drop_overlap: bool = False,
    overwrite: bool = False,
    command: str = "",
) -> Path:
    """Score models as they are and write a run folder: one row per model in results.jsonl, every response in
    generations.jsonl.

    Raises:
        UsageError: anything that cannot be loaded, or prompts to score on that a model was trained on.
    """
    from tunevax.modeling.loading import load
    from tunevax.runs import SCHEMA, data_entry, digest, require_one_process, writing

    require_one_process("scoring")
    exclusion = Exclusion.of(map(used_prompts, models), drop_overlap)
    exam = build_exam(options, safety_data, task_data, weights_change=False, exclusion=exclusion)
    overlaps = [check(ref, exam.roles(), allow=allow_overlap) for ref in models]
    record = {
        "verb": "score", "method": None, "command": command, "seed": 0, "parent": None,
        "config": {"models": models, **vars(options)},
        "data": [data_entry("evaluation", options.eval_data or safety_data, exam.harmful)],
        "overlap_dropped": exclusion.summary(),
    }  # fmt: skip
    results, generations, targets = [], [], []
    with writing(output_dir, record, overwrite=overwrite) as run:
        if exclusion.dropped:
            run.write_lines("dropped.jsonl", exclusion.dropped)
        for ref, label, overlap in zip(models, labels_of(models), overlaps, strict=True):
            how = vllm_engine.loading(ref, revision, dtype) if exam.engine == "vllm" else {"dtype": dtype}
            loaded = load(ref, revision=revision, chat_template=chat_template, **how)
            if exam.engine == "vllm" and loaded.info["attached"]:
                raise UsageError(
                    f"{ref} has biases attached (a safety lock), which vLLM does not read; score it without --engine"
                )
            scores, samples = examine(loaded.model, loaded.tokenizer, exam, full=True)
            key = {"model": label, "attack": None, "seed": 0, "step": 0}
            results.append(
                {
                    "schema": SCHEMA,
                    **key,
                    "role": "model",
                    "attack_hash": None,
                    "samples": 0,
                    "train_loss": None,
                    "scores": scores,
                }
            )
            generations += [{**key, **sample} for sample in samples]
            targets.append(
                {
                    "label": label,
                    "role": "model",
                    "ref": loaded.info["ref"],
                    **overlap,
                    "template_hash": digest(loaded.tokenizer.chat_template),
                }
            )
            record["model"] = record.get("model") or loaded.info
        record["targets"] = targets
        if exam.harness:
            record["lm_eval"] = exam.harness.versions
        run.write_lines("results.jsonl", results)
        run.write_lines("generations.jsonl", generations)
    return run.final
