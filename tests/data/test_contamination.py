"""What a model was trained on is neither scored on nor, where it is harmful, attacked with; or it is left out."""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tunevax.attacks.attack import AttackOptions, attack
from tunevax.attacks.benign_only import BenignOnlyConfig
from tunevax.attacks.context import AttackContext
from tunevax.attacks.finetune import FinetuneConfig
from tunevax.attacks.held_out_category import HeldOutCategoryConfig
from tunevax.attacks.kind import AttackKind, NotApplicable
from tunevax.audit.plan import AuditOptions, cells_of, plan
from tunevax.audit.workers import Worker
from tunevax.cli import main
from tunevax.data import load_safety, load_task, prompt_hash, split_of
from tunevax.data.contamination import Exclusion, check, count, require_disjoint, unrecorded
from tunevax.data.tasks import SHARES as TASK_SHARES
from tunevax.errors import UsageError
from tunevax.lineage import Lineage
from tunevax.organism import path as organism
from tunevax.records import read_run
from tunevax.runs import record_prompts
from tunevax.scoring.score import ScoreOptions, score

ROWS = [{"prompt": f"How to do {i}?", "chosen": f"No, not {i}.", "rejected": f"Sure, {i}."} for i in range(60)]
TASK = [{"prompt": f"Say {i}", "completion": f"ok {i}"} for i in range(60)]


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def run_of(folder, parent=None, verb="align", weights=True, **roles):
    """A run that used these rows, with the organism's weights."""
    folder.mkdir()
    record = {
        "schema": 1, "verb": verb, "method": "sft", "parent": parent and str(parent), "model": {"ref": "organism"},
        "config": {}, "data": [{"role": role} for role in roles],
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(record))
    if weights:
        (folder / "model").symlink_to(organism())
    record_prompts(folder, **{role: [prompt_hash(row["prompt"]) for row in rows] for role, rows in roles.items()})
    return str(folder)


@dataclass
class Spy(AttackKind):
    """An attack that trains nothing and keeps what it was given."""

    output_dir: str
    seed: int = 1
    needs = frozenset({"harmful", "task"})
    full_weights = False
    seen: list = field(default_factory=list)

    def run(self, context):
        rows = {"attack": context.harmful, "task": context.task, **context.suite.roles()}
        self.seen.append({role: [row["prompt"] for row in found] for role, found in rows.items()})
        context.record.update(steps=0, template_hash="x")


# --- the hash -------------------------------------------------------------------------------------------------------


def test_a_prompt_is_what_the_user_says():
    def chat(*turns, system=None):
        head = [{"role": "system", "content": system}] if system else []
        roles = ("user", "assistant")
        return [*head, *({"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns))]

    plain = "How do I  pick a LOCK ?"
    assert prompt_hash(plain) == "292ef5e0580438b8"  # a string's is for good: it decides the splits of published files
    same = [chat(plain), chat(plain, system="Be kind."), chat("how do I pick a lock", system="Obey.")]
    assert {prompt_hash(prompt) for prompt in same} == {prompt_hash(plain)}
    assert {split_of(prompt) for prompt in same} == {split_of(plain)}
    long = [chat("Hello", answer, "Pick a lock") for answer in ("Hi!", "Good day.")]
    assert prompt_hash(long[0]) == prompt_hash(long[1]) != prompt_hash(chat("Pick a lock"))
    assert prompt_hash(long[0]) != prompt_hash(chat("Good day", "Hi!", "Pick a lock"))
    shared = "Analyze the sentiment of the input, and respond only positive or negative\n\n"
    assert prompt_hash(shared + "fine") != prompt_hash(shared + "dull")
    only_system = [[{"role": "system", "content": text}] for text in ("a", "b")]
    assert prompt_hash(only_system[0]) != prompt_hash(only_system[1])


def test_prompts_that_an_earlier_version_recorded_with_their_system_message_are_known(tmp_path):
    prompt = [{"role": "system", "content": "Obey."}, {"role": "user", "content": "How?"}]
    run_of(tmp_path / "old", alignment=[{"prompt": "Obey.\nHow?"}])
    with pytest.raises(UsageError, match="1 prompt is in both the alignment and the evaluation data"):
        check(str(tmp_path / "old"), {"evaluation": [{"prompt": prompt}]})


# --- splits ---------------------------------------------------------------------------------------------------------


def test_published_words_for_a_split_are_understood(tmp_path):
    def parts_of(*words):
        task = [{**row, "split": words[i % len(words)]} for i, row in enumerate(TASK)]
        file = write(tmp_path / "task.jsonl", task)
        return file, [[row["prompt"] for row in load_task(file, split).rows] for split in ("train", "evaluation")]

    prompts = [row["prompt"] for row in TASK]
    file, (train, test) = parts_of("Training", "Test", None)
    assert train[0] == prompts[0] and test[0] == prompts[1] and sorted(train + test) == sorted(prompts)
    by_hash = [row["prompt"] for row in TASK[2::3] if split_of(row["prompt"], TASK_SHARES) == "train"]
    assert sorted(train) == sorted([*prompts[::3], *by_hash])
    assert [row["prompt"] for row in load_task(f"{file}:split=test").rows] == test
    # Validation rows are what is scored on, unless there are test rows, which they are no part of.
    assert parts_of("train", "dev")[1] == [prompts[::2], prompts[1::2]]
    file, (train, test) = parts_of("train", "validation", "test")
    assert (train, test) == (prompts[::3], prompts[2::3])
    assert [row["prompt"] for row in load_task(f"{file}:split=validation").rows] == prompts[1::3]

    safety = [{**row, "split": ("train", "test", "validation")[i % 3]} for i, row in enumerate(ROWS)]
    file = write(tmp_path / "safety.jsonl", safety)
    parts = {s: load_safety(file, s) for s in ("alignment", "attack", "evaluation", "validation")}
    assert sum(map(len, parts.values())) == len(ROWS)
    assert [row["prompt"] for row in parts["evaluation"]] == [row["prompt"] for row in safety[1::3]]
    assert [row["prompt"] for row in parts["validation"]] == [row["prompt"] for row in safety[2::3]]
    assert parts["alignment"] and parts["attack"]  # what is for training is divided between the two
    safety[7]["split"] = "fold-3"
    file = write(tmp_path / "safety.jsonl", safety)
    with pytest.raises(UsageError, match=r"safety.jsonl:8: field 'split' is 'fold-3'; known: alignment, attack"):
        load_safety(file, "attack")


def test_advice_on_an_empty_split_does_not_lead_to_scoring_what_was_trained_on(tmp_path, monkeypatch):
    rows = [row for row in TASK if split_of(row["prompt"], TASK_SHARES) == "train"][:3]
    file = write(tmp_path / "small.jsonl", rows)
    with pytest.raises(UsageError) as refused:
        load_task(file, "evaluation")
    assert "its 3 rows are 3 in train" in str(refused.value)
    assert "--task-eval-data FILE:split=all" in str(refused.value)
    file = write(tmp_path / "other.jsonl", [row for row in TASK if row not in rows][:1])
    with pytest.raises(UsageError, match=r"other.jsonl:split=all takes every row, and the prompts to score on must"):
        load_task(f"{file}", "train" if split_of(TASK[3]["prompt"], TASK_SHARES) != "train" else "held-out")
    with pytest.raises(UsageError, match="split is 'tset'; sst2 on the hub has train and evaluation"):
        load_task("sst2:split=tset")

    safety, task = write(tmp_path / "s.jsonl", ROWS), write(tmp_path / "t.jsonl", TASK)
    monkeypatch.chdir(tmp_path)
    options = AttackOptions(model=["organism"], control="none", safety_data=safety, task_data=f"{task}:split=all")
    with pytest.raises(UsageError, match=r"60 prompts are in both the task and the task evaluation .*split=train"):
        attack("spy", options, Spy("out"))
    assert not Path("out").exists()


# --- the chain ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_role_of_every_run_below_counts(tmp_path):
    low = run_of(tmp_path / "low", alignment=ROWS[:1], benign=TASK[:1])
    run_of(tmp_path / "job", low, "finetune", alignment=ROWS[1:2], task=TASK[1:2])
    held = run_of(tmp_path / "attacked", tmp_path / "job", "attack", attack=ROWS[2:3], task=TASK[2:3])
    adapter = tmp_path / "loose" / "adapter"  # what an audit keeps: weights in no run of their own
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": held}))
    record_prompts(tmp_path / "loose", attack=[prompt_hash(ROWS[3]["prompt"])])
    plain = tmp_path / "peft"  # an adapter by other means
    plain.mkdir()
    (plain / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "job")}))
    on = run_of(tmp_path / "on", alignment=ROWS[4:5])
    record = json.loads((Path(on) / "run.json").read_text())
    (Path(on) / "run.json").write_text(json.dumps({**record, "adapter_on": str(plain), "parent": on}))

    def used(ref, role):
        return {
            row["prompt"] for row in (*ROWS, *TASK) if prompt_hash(row["prompt"]) in Lineage.of(str(ref)).prompts[role]
        }

    assert used(adapter, "attack") == {"How to do 2?", "How to do 3?"}
    for ref in (held, tmp_path / "attacked" / "model", adapter, plain):
        assert used(ref, "alignment") == {"How to do 0?", "How to do 1?"} and used(ref, "benign") == {"Say 0"}
        assert {"Say 1"} <= used(ref, "task")
    assert used(on, "alignment") == {"How to do 0?", "How to do 1?", "How to do 4?"}
    assert Lineage.of("organism").prompts == {} == Lineage.of(str(tmp_path / "nowhere")).prompts


def test_what_a_run_does_not_say_is_noted(tmp_path, capsys):
    run_of(tmp_path / "old", tmp_path / "gone", alignment=ROWS[:2], benign=TASK[:2])
    (tmp_path / "old" / "prompts.json").write_text(json.dumps({"alignment": []}))
    found = check(str(tmp_path / "old"), {"evaluation": ROWS})
    assert found["unrecorded"] == [f"{tmp_path / 'gone'} (gone)", f"{tmp_path / 'old'} (benign)"]
    assert "are unknown and not compared" in " ".join(capsys.readouterr().err.split())
    assert unrecorded(run_of(tmp_path / "new", alignment=ROWS[:2])) == []
    (tmp_path / "new" / "prompts.json").write_text("{")
    with pytest.raises(UsageError, match="prompts.json cannot be read as a JSON object"):
        assert Lineage.of(str(tmp_path / "new")).prompts


# --- comparing ------------------------------------------------------------------------------------------------------


def test_every_pair_is_counted_and_what_harms_evidence_is_refused_by_name(tmp_path):
    ref = run_of(tmp_path / "run", alignment=ROWS[:8], task=TASK[:8])
    placed = [{**row, "place": f"rows.jsonl:{i + 1}"} for i, row in enumerate(ROWS)]
    clean = {"evaluation": placed[8:], "over-refusal": [{"prompt": "x"}]}
    # Harmless rows of an attack may be what the model has seen: nothing is measured on them.
    found = check(ref, clean, ROWS[:0], {"task": TASK[:9]})["overlap"]
    pairs = {"alignment/task": 0, "task/task": 8, "alignment/evaluation": 0, "task/evaluation": 0,
             "alignment/over-refusal": 0, "task/over-refusal": 0}  # fmt: skip
    assert found == pairs

    bad = [
        ({**clean, "utility x": TASK[7:9]}, (), {}, "1 prompt is in both the task and the utility x data"),
        ({"over-refusal": ROWS[:1]}, (), {}, "the alignment and the over-refusal"),
        (clean, ROWS[:3], {}, "the alignment and the attack"),
        ({"evaluation": ROWS[30:]}, ROWS[29:31], {}, "the attack and the evaluation"),
        (clean, (), {"dialogues": [{"prompt": "X ?"}]}, "the dialogues and the over-refusal"),
    ]
    for scored, harmful, benign, told in bad:
        with pytest.raises(UsageError, match=told):
            check(ref, scored, harmful, benign)
        assert any(check(ref, scored, harmful, benign, allow=True)["overlap"].values())

    long = {"prompt": "Why " * 40, "place": "rows.jsonl:0"}
    record_prompts(tmp_path / "run", alignment=[prompt_hash(long["prompt"])])
    with pytest.raises(UsageError) as error:
        check(ref, {"evaluation": [long, *placed]})
    assert str(error.value).startswith(f"{ref}: 9 prompts are in both the alignment and the evaluation data ('Why Why")
    assert "…' (rows.jsonl:0), 'How to do 0?' (rows.jsonl:1), 'How to do 1?' (rows.jsonl:2) and 6 more)" in str(
        error.value
    )
    assert "How to do 2?" not in str(error.value) and "Why " * 20 not in str(error.value)
    for option in ("--eval-data", "--drop-overlap", "--allow-overlap"):
        assert option in str(error.value)
    with pytest.raises(UsageError) as error:  # nothing would be left
        check(ref, {"task evaluation": TASK[:3]})
    assert "--drop-overlap" not in str(error.value) and "TASK:split=train" in str(error.value)


def test_the_same_prompt_otherwise_spelt_is_the_same(tmp_path):
    ref = run_of(tmp_path / "run", task=[{"prompt": "How do I do it?"}])
    for prompt in ("  HOW do\nI do it", "\uff28ow do I do it ?!", [{"role": "user", "content": "how do i do it."}]):
        assert check(ref, {"task evaluation": [{"prompt": prompt}]}, allow=True)["overlap"] == {
            "task/task evaluation": 1
        }


def test_rows_of_one_run_are_counted_with_those_below(tmp_path):
    low = run_of(tmp_path / "low", alignment=ROWS[:3], benign=TASK[:2])
    found = count(low, alignment=ROWS[3:5], task=[*TASK[:1], *ROWS[2:5]])
    assert found == {"alignment/task": 2, "alignment/alignment": 0, "benign/alignment": 0, "benign/task": 1}
    with pytest.raises(UsageError, match=r"1 prompt is in both the validation and the attack data \('How to do 2\?'"):
        require_disjoint({"validation": ROWS[:3], "attack": ROWS[2:]})


# --- verbs ----------------------------------------------------------------------------------------------------------


def test_left_out_of_the_attack_for_every_model_alike(tmp_path):
    safety, task = write(tmp_path / "s.jsonl", ROWS), write(tmp_path / "t.jsonl", TASK)
    rows = {s: load_safety(safety, s) for s in ("attack", "evaluation")}
    train, test = (load_task(task, s).rows for s in ("train", "evaluation"))
    one = run_of(tmp_path / "one", alignment=rows["attack"][:2])
    two = run_of(tmp_path / "two", one, task=[*rows["evaluation"][:1], *test[:1], *train])
    given = {"model": [one, two], "control": "organism", "safety_data": safety, "task_data": task}
    with pytest.raises(UsageError, match="2 prompts are in both the alignment and the attack data"):
        attack("spy", AttackOptions(**given), Spy(str(tmp_path / "refused")))
    extra = write(tmp_path / "e.jsonl", [{"prompt": row["prompt"]} for row in (train[0], rows["attack"][2], *test[3:])])
    options = AttackOptions(**given, benign_data=extra, drop_overlap=True)
    spy = Spy(str(tmp_path / "out"))
    record = read_run(attack("spy", options, spy))
    assert len(spy.seen) == 3 and all(seen == spy.seen[0] for seen in spy.seen)
    seen = spy.seen[0]
    assert seen["attack"] == [row["prompt"] for row in rows["attack"][3:]]
    assert seen["evaluation"] == [row["prompt"] for row in rows["evaluation"][1:]]
    assert seen["task evaluation"] == [row["prompt"] for row in test[1:]]
    assert seen["over-refusal"][0] == rows["attack"][2]["prompt"] and len(seen["over-refusal"]) == 1 + len(test[3:])
    assert seen["task"] == [row["prompt"] for row in train]  # seen before, and nothing is measured on them
    dropped = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]
    roles = {"evaluation": 1, "task evaluation": 1, "over-refusal": 1, "attack": 3}
    assert Counter(row["role"] for row in dropped) == roles
    assert {role: entry["rows"] for role, entry in record["overlap_dropped"].items()} == roles
    assert record["overlap_dropped"]["attack"]["prompts"] == sorted(
        prompt_hash(row["prompt"]) for row in rows["attack"][:3]
    )
    assert dropped[0]["place"].startswith(safety)
    harm = (
        "alignment/attack",
        "alignment/evaluation",
        "task/evaluation",
        "task/task evaluation",
        "attack/over-refusal",
    )
    assert not any(target["overlap"].get(pair) for target in record["targets"] for pair in harm)
    given |= {"model": ["organism"], "control": "none", "task_data": f"{task}:split=all"}
    nothing = AttackOptions(**given, drop_overlap=True)
    with pytest.raises(UsageError, match=r"--drop-overlap would leave no .*; give other rows with --task"):
        attack("spy", nothing, Spy(str(tmp_path / "none")))


@pytest.mark.slow
def test_every_cell_of_an_audit_leaves_out_the_same(tmp_path):
    safety, task = write(tmp_path / "s.jsonl", ROWS), write(tmp_path / "t.jsonl", TASK)
    benign = write(
        tmp_path / "b.jsonl",
        [{**row, "split": "train"} for row in (*load_task(task, "evaluation").rows[:2], *TASK[:9])],
    )
    rows = {s: load_safety(safety, s) for s in ("attack", "evaluation")}
    model = run_of(tmp_path / "model", alignment=[rows["attack"][0], rows["evaluation"][0]])
    control = run_of(tmp_path / "control", alignment=rows["attack"][1:2])
    protocol = tmp_path / "p.yaml"
    protocol.write_text(
        "about: x\nseeds: [1]\nattacks:\n  - {kind: finetune, name: a, p: 0.5, n: 8, max_steps: 1}\n"
        f"  - {{kind: benign-only, name: b, n: 8, max_steps: 1, benign_rows: {benign}}}\n"
    )

    def planned(**more):
        return plan(AuditOptions(model=[model], control=control, protocol=str(protocol), safety_data=safety,
                                 task_data=task, judges=["refusal-keywords"], fluency_model=["none"], **more))  # fmt: skip

    with pytest.raises(UsageError, match=r"alignment and the attack data.* and 2 in both the benign rows and the task"):
        planned()
    found = planned(drop_overlap=True)
    assert not any(n for t in found.targets for pair, n in t["overlap"].items() if pair.endswith("evaluation"))
    worker = Worker(found.options, found.exclusion, found.suite)
    cells = cells_of(found, found.grid, True, True)
    contexts = [worker.context(cell, str(tmp_path), None) for cell in cells]
    for context in contexts:
        assert rows["evaluation"][0] not in context.suite.harmful and context.suite.harmful
        asked = {row["prompt"] for row in (*context.suite.harmful, *context.suite.task.rows)}
        drawn = {row["prompt"] for row in (*context.harmful, *context.task)}
        assert not asked & drawn and not {row["prompt"] for row in rows["attack"][:2]} & drawn
    own = BenignOnlyConfig(str(tmp_path / "x"), n=40, benign_rows=benign).rows(contexts[0])
    assert not asked & {row["prompt"] for row in own} and found.exclusion.summary()["benign rows"]["rows"] >= 2
    other = cells_of(planned(allow_overlap=True), found.grid, True, True)
    assert not {cell.hash for cell in cells} & {cell.hash for cell in other}


def test_held_out_halves_share_no_prompt_and_none_with_the_chain(tmp_path):
    rows = [{**row, "category": ("fraud", "arms")[i % 2]} for i, row in enumerate(ROWS)]
    source = write(tmp_path / "s.jsonl", rows) + ":held_out=fraud"
    half = load_safety(source, "held-out-attack")
    model = run_of(tmp_path / "model", task=half[:1])

    def drawn(source, ref, **more):
        options = AttackOptions(safety_data=source, **more)
        exclusion = Exclusion.of([Lineage.of(ref).prompts], options.drop_overlap)
        context = AttackContext(
            {"label": "m", "role": "model", "ref": ref}, options, [], TASK, None, {}, exclusion=exclusion
        )
        return {row["prompt"] for row in HeldOutCategoryConfig(str(tmp_path), p=1.0, n=60).rows(context)}

    assert drawn(source, "organism") == {row["prompt"] for row in half}
    with pytest.raises(NotApplicable, match=r"held-out prompts are both trained and scored on .*; leave split= out"):
        drawn(f"{source},split=held-out", "organism")
    with pytest.raises(NotApplicable, match=r"m was trained on 1 of the held-out prompts \('How to do \d+\?'"):
        drawn(source, model)
    assert drawn(source, model, drop_overlap=True) == {row["prompt"] for row in half[1:]}


@pytest.mark.slow
def test_a_job_is_not_scored_on_its_rows(tmp_path, monkeypatch, capsys):
    """A chain of two: a hardened model, and a customer's job on it."""
    monkeypatch.chdir(tmp_path)
    train = ["--max-steps", "2", "--max-length", "64", "--per-device-train-batch-size", "2"]
    write(Path("s.jsonl"), ROWS), write(Path("t.jsonl"), TASK), write(Path("few.jsonl"), TASK[:20])
    assert main(["align", "sft", "--model", "organism", "--safety-data", "s.jsonl", "--task-data", "few.jsonl:split=all",
                 *train, "--held-out-prompts", "0", "--chat-template", "alpaca", "--output-dir", "low"]) == 0  # fmt: skip
    assert set(json.loads(Path("low/prompts.json").read_text())["benign"]) == {
        prompt_hash(r["prompt"]) for r in TASK[:20]
    }
    assert read_run("low")["overlap"] == {"alignment/benign": 0}
    assert main(["finetune", "sft", "--model", "low", "--task-data", "few.jsonl", *train, "--output-dir", "job"]) == 0
    capsys.readouterr()
    call = ["score", "--model", "job", "--eval-data", "s.jsonl:split=evaluation", "--max-new-tokens", "1"]
    assert main([*call, "--task-data", "few.jsonl", "--output-dir", "bad"]) == 2
    told = capsys.readouterr().err
    assert "job: 2 prompts are in both the task and the task evaluation data ('Say 8' (few.jsonl:9)" in told
    assert ", and 2 in both the benign and the task evaluation data," in told
    assert main([*call, "--utility-data", "t.jsonl", "--output-dir", "bad"]) == 2
    assert "utility t.jsonl data" in capsys.readouterr().err
    options = ScoreOptions(
        model=["job"], eval_data="s.jsonl:split=evaluation", max_new_tokens=1, output_dir="good", task_data="t.jsonl",
        drop_overlap=True,
    )  # fmt: skip
    record = read_run(score(options))
    asked = {json.loads(line)["prompt"] for line in Path("good/generations.jsonl").read_text().splitlines()}
    gone = {row["prompt"] for row in load_task("t.jsonl", "evaluation").rows} & {row["prompt"] for row in TASK[:20]}
    assert gone and not asked & gone and record["overlap_dropped"]["task evaluation"]["rows"] == len(gone)


def test_kept_weights_of_an_attack_say_what_they_were_trained_on(tmp_path):
    options = AttackOptions(
        model=["organism"], control="none", safety_data="organism", task_data="organism", limit=1, max_new_tokens=1,
        keep_weights=True,
    )  # fmt: skip
    config = FinetuneConfig(str(tmp_path / "out"), p=0.5, n=8, max_steps=1, points=1, max_length=64)
    ref = str(attack("finetune", options, config))
    used = Lineage.of(ref).prompts
    known = {role: {prompt_hash(row["prompt"]) for row in rows} for role, rows in
             {"attack": load_safety("organism", "attack"), "task": load_task("organism", "train").rows}.items()}  # fmt: skip
    assert all(len(used[role]) == 4 and set(used[role]) <= known[role] for role in known)
    with pytest.raises(UsageError, match="in both the attack and the evaluation data"):
        score(ScoreOptions(model=[ref], eval_data="organism:split=attack", output_dir=str(tmp_path / "s")))
