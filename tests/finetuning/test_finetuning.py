"""Every method of the fine-tuning stage against plain fine-tuning and against losses put together by hand."""

import json
import random
import subprocess
import sys
from dataclasses import fields

import numpy as np
import pytest
import torch
from tiny import in_float64, loss_of

from tunevax.data.safety import load_safety
from tunevax.data.tasks import load_task
from tunevax.errors import UsageError
from tunevax.finetuning.analyze import SinkOptions, analyze_sink
from tunevax.finetuning.ewc import EWCConfig, EWCTrainer, exact_fisher, factored_fisher, weighted_square
from tunevax.finetuning.finetune import FinetuneOptions, finetune
from tunevax.finetuning.ldifs import LDIFSConfig, LDIFSTrainer
from tunevax.finetuning.lisa import LisaConfig, LisaTrainer
from tunevax.finetuning.safe_instruct import SafeInstructConfig, SafeInstructTrainer
from tunevax.finetuning.sft import FinetuneTrainer, JobConfig
from tunevax.methods import load_method
from tunevax.modeling.loading import load
from tunevax.records import read_run
from tunevax.scoring.score import ScoreOptions, score

pytestmark = pytest.mark.numerical

close = pytest.approx
TASK = load_task("organism").rows[:16] + load_task("organism:set=benign").rows[:8]  # of two lengths
SAFETY = load_safety("organism", "alignment", ("chosen", "rejected"))[:16]
TRAINING = {
    "max_steps": 5, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 2e-3,
    "warmup_steps": 0, "max_length": 64, "save_strategy": "no", "seed": 3,
}  # fmt: skip


@pytest.fixture
def make(tmp_path):
    """A trainer on the organism, with its first step's accumulation set, and `.seen`: the customer's batches."""

    def build(cls=FinetuneTrainer, safety=SAFETY, task=TASK, **options):
        loaded = load("organism")
        in_float64(loaded.model)
        config = cls.config_class(str(tmp_path), **{**TRAINING, **options})
        trainer = cls(loaded.model, config, safety_data=safety, task_data=task, processing_class=loaded.tokenizer)
        trainer.current_gradient_accumulation_steps = config.gradient_accumulation_steps
        trainer.seen, original = [], trainer.get_batch_samples

        def samples(*args):
            batches, items = original(*args)
            trainer.seen += [b["input_ids"] for b in batches]
            return batches, items

        trainer.get_batch_samples = samples
        return trainer

    return build


def weights(trainer):
    return [p.detach().clone() for p in trainer.parameters]


def gradients(trainer):
    return [None if p.grad is None else p.grad.clone() for p in trainer.parameters]


def same(first, second):
    return all(a is b or torch.equal(a, b) for a, b in zip(first, second, strict=True))


def stirred(trainer, size=0.05):
    """Move the adapter away from where it starts."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in trainer.parameters:
            p.add_(torch.randn(p.shape, generator=generator).to(p) * size)
    return trainer


def first_batch(trainer, rows=4):
    from tunevax.data.encoding import collate

    return collate(trainer.train_dataset[-rows - 6 : -6], trainer.processing_class.pad_token_id)


ZERO = [
    ("lisa", {"k1": 0, "rho": 0.0, "full_weights": True}),
    ("safe-instruct", {"mode": "joint", "lamb": 0.0}),
    ("ewc", {"lamb": 0.0, "full_weights": True}),
    ("surgery", {"lamb": 0.0, "full_weights": True}),
]
"""Beside what each method says in `off`, which tests/contract runs."""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), ZERO)
def test_knob_at_zero_is_plain_fine_tuning(make, name, options):
    """Bit for bit, with dropout, so that one number taken from a global generator would show."""
    try:
        cls = load_method("tunevax.finetuning", name)
    except ModuleNotFoundError:
        pytest.skip(f"{name} is not there")
    shared = {} if options.get("full_weights") else {"lora_dropout": 0.2}
    plain = make(full_weights=options.get("full_weights", False), **shared)
    loss = plain.train().training_loss
    ours = make(cls, **options, **shared)  # which seeds everything
    assert ours.train().training_loss == loss and ours.cost() == 1
    assert same(weights(plain), weights(ours))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lisa", {"k1": 2, "k2": 2}),
        ("lisa", {"k1": 1, "k2": 9, "rho": 0.0}),
        ("safe-instruct", {"mode": "joint"}),
        ("ldifs", {}),
        ("ewc", {"lamb": 100.0}),
        ("ewc", {"lamb": 100.0, "full_weights": True}),
    ],
)
def test_a_knob_does_something_and_the_customers_batches_stay(make, name, options):
    plain = make(full_weights=options.get("full_weights", False))
    plain.train()
    ours = make(load_method("tunevax.finetuning", name), **options)
    ours.train()
    assert not same(weights(plain), weights(ours))
    assert len(plain.seen) == 10 and same(plain.seen, ours.seen) and ours.state.global_step == 5
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in ours.model.modules())
    assert [p.requires_grad for p in ours.model.parameters()] == [p.requires_grad for p in plain.model.parameters()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cls", "options"),
    [(SafeInstructTrainer, {"mode": "joint"}), (LDIFSTrainer, {"lamb": 3.0}), (EWCTrainer, {}), (LisaTrainer, {})],
)
def test_micro_batches_add_up(make, cls, options):
    """Two micro-batches of 2 rows have the gradient of one of 4, of unequal length and padding."""
    found = []
    for size, parts in ((2, 2), (4, 1)):
        trainer = stirred(make(cls, per_device_train_batch_size=size, gradient_accumulation_steps=parts, **options))
        if cls is LisaTrainer:
            trainer.anchor = [torch.zeros_like(p) for p in trainer.parameters]
        rows = sorted(trainer.train_dataset, key=lambda r: len(r["input_ids"]))
        rows = [*rows[:2], *rows[-2:]]
        batches = [trainer.data_collator(rows[i : i + size]) for i in range(0, 4, size)]
        batches, items = trainer.get_batch_samples(iter(batches), parts, torch.device("cpu"))
        for batch in batches:
            trainer.compute_loss(trainer.model, batch, num_items_in_batch=items).backward()
        found.append(gradients(trainer))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_lisa_takes_the_steps_of_both_states(make):
    """Two cycles of one alignment and two customer's steps, against the same done by hand with stock AdamW."""
    rho = 0.7
    ours = make(LisaTrainer, k1=1, k2=2, rho=rho, max_steps=4, lr_scheduler_type="constant", max_grad_norm=0.0)
    ours.train()
    hand = make(gradient_accumulation_steps=2, lr_scheduler_type="constant")
    hand.create_optimizer()
    other = make(LisaTrainer)
    anchor = weights(hand)

    def step(batches):
        items = sum((b["labels"][:, 1:] != -100).sum() for b in batches)
        for batch in batches:
            hand.batch_loss(hand.model, batch, items).backward()
        with torch.no_grad():
            for p, a in zip(hand.parameters, anchor, strict=True):
                p.grad += rho * (p - a)
        hand.optimizer.step(), hand.optimizer.zero_grad()

    hand.model.train()
    by_ids = {tuple(r["input_ids"]): r for r in hand.train_dataset}
    customers = [[by_ids[tuple(i for i in row.tolist() if i != hand.processing_class.pad_token_id)] for row in ids]
                 for ids in ours.seen]  # fmt: skip
    for number in range(4):
        if number % 2 == 0:
            anchor = weights(hand)
            step(other.draws.batches(other, other.safe))
            anchor = weights(hand)
        step([hand.data_collator(rows) for rows in customers[2 * number : 2 * number + 2]])
    for a, b in zip(weights(ours), weights(hand), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert ours.alignment_steps == 2 and ours.cost() == 1.5


@pytest.mark.slow
@pytest.mark.parametrize(("k2", "warmup", "before"), [(2, 2, [1, 3]), (900, 2, [1]), (900, 0, [0]), (3, 0, [0, 3])])
def test_lisa_aligns_before_the_first_step_that_moves_and_every_k2th_after(make, monkeypatch, k2, warmup, before):
    """A warm-up begins at zero, where alignment steps move nothing; a run shorter than k2 must not go without."""
    trainer, seen = make(LisaTrainer, k1=3, k2=k2, max_steps=5, warmup_steps=warmup), []
    align = trainer.align

    def watched(model):
        start = weights(trainer)
        align(model)
        seen.append(trainer.state.global_step)
        assert not same(start, weights(trainer))

    monkeypatch.setattr(trainer, "align", watched)
    trainer.train()
    assert seen == before and trainer.alignment_steps == 3 * len(before)


TWO_RANKS = """
import sys, torch
from tunevax.data.safety import load_safety
from tunevax.data.tasks import load_task
from tunevax.finetuning.lisa import LisaConfig, LisaTrainer
from tunevax.modeling.loading import load

torch.set_num_threads(1)
loaded = load("organism", device="cpu")
config = LisaConfig(
    sys.argv[1] + "/run", k1=2, k2=2, rho=0.5, max_steps=3, gradient_accumulation_steps=2, use_cpu=True,
    per_device_train_batch_size=4 // int(sys.argv[2]), learning_rate=0.1, optim="sgd", weight_decay=0.0,
    lr_scheduler_type="constant", warmup_steps=0, max_length=64, save_strategy="no", lora_dropout=0.0,
)
rows = load_task("organism").rows[:24], load_safety("organism", "alignment", ("chosen",))[:32]
trainer = LisaTrainer(
    loaded.model, config, task_data=rows[0], safety_data=rows[1], processing_class=loaded.tokenizer
)
trainer.train()
torch.save([p.detach() for p in trainer.parameters], f"{sys.argv[1]}/{sys.argv[2]}-{trainer.args.process_index}.pt")
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_lisa_on_two_ranks_with_accumulation_is_the_run_of_one(tmp_path):
    """The alignment batches of a rank run where DDP is told not to sync, and still must be of all ranks."""
    (tmp_path / "job.py").write_text(TWO_RANKS)
    for ranks in (1, 2):
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
        command = [sys.executable, *launch, str(tmp_path / "job.py"), str(tmp_path), str(ranks)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    one, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    assert same(first, second)
    for a, b in zip(one, first, strict=True):
        assert (a - b).norm() <= 1e-4 * a.norm()


@pytest.mark.slow
def test_lisa_leaves_accumulation_as_it_was_when_a_step_fails(make):
    trainer = make(LisaTrainer, k1=1, gradient_accumulation_steps=1)
    sync = trainer.accelerator.gradient_state
    sync._set_sync_gradients(False)
    trainer.model.require_backward_grad_sync = False  # as DDP has it under no_sync
    trainer.compute_loss = lambda *_, **__: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.align(trainer.model)
    assert sync.sync_gradients is False and trainer.model.require_backward_grad_sync is False
    sync._set_sync_gradients(True)


@pytest.mark.slow
def test_mix_appends_and_joint_weighs(make):
    plain, mixed = make(), make(SafeInstructTrainer, safety_rows=0.25)
    assert list(mixed.train_dataset[:24]) == list(plain.train_dataset) and len(mixed.train_dataset) == 30
    safe = mixed.encode_answers(SAFETY, "chosen")
    assert all(row in safe for row in mixed.train_dataset[24:])
    assert len({str(r) for r in mixed.train_dataset[24:]}) == 6
    assert len(make(SafeInstructTrainer, safety_rows=20).train_dataset) == 44  # more than there are: drawn again

    joint = make(SafeInstructTrainer, mode="joint", lamb=0.3, gradient_accumulation_steps=1)
    again = make(SafeInstructTrainer, mode="joint", lamb=0.3, gradient_accumulation_steps=1)
    stirred(joint), stirred(again)
    batch, items = first_batch(joint), torch.tensor(50)
    joint.compute_loss(joint.model, batch, num_items_in_batch=items).backward()
    (safety,) = again.draws.batches(again, again.safe)
    (again.batch_loss(again.model, batch, items) + 0.3 * again.batch_loss(again.model, safety, None)).backward()
    for a, b in zip(gradients(joint), gradients(again), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_ldifs_is_the_mean_square_of_what_moved(make):
    """From stock hidden states of the model with and without adapter; pads are garbage and must not count."""
    trainer = make(LDIFSTrainer, lamb=2.0, lora_dropout=0.3, gradient_accumulation_steps=1)
    batch = first_batch(trainer)
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch)
    assert trainer._metrics["distance"] == [0.0]  # the adapter is fresh: no drop-out below a threshold, no dropout
    assert trainer.model.training
    stirred(trainer), trainer.model.eval()
    loss = trainer.compute_loss(trainer.model, batch)
    ids = {k: batch[k] for k in ("input_ids", "attention_mask")}

    def states():  # the last is normed; its input is what the last block gave
        caught = []
        handle = trainer.blocks[-1].module.register_forward_hook(lambda _m, _a, out: caught.append(out))
        hidden = trainer.model(**ids, output_hidden_states=True).hidden_states[1:-1]
        handle.remove()
        return [*hidden, caught[0] if torch.is_tensor(caught[0]) else caught[0][0]]

    with torch.no_grad(), trainer.model.disable_adapter():
        before = states()
    mask = batch["attention_mask"]
    assert (mask == 0).any()
    parts = [
        (((h - h0) ** 2).sum(-1) * mask).sum() / mask.sum() / h.shape[-1]
        for h, h0 in zip(states(), before, strict=True)
    ]
    expected = trainer.batch_loss(trainer.model, batch, None) + 2.0 * sum(parts) / len(parts)
    assert len(parts) == 8 and loss.item() == close(expected.item(), rel=1e-9)
    ours = torch.autograd.grad(loss, trainer.parameters)
    for a, b in zip(ours, torch.autograd.grad(expected, trainer.parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_ewc_weighs_the_change_of_the_weight_by_its_fisher_information(make):
    """Against F of every entry from autograd, row by row, and dW put together whole."""
    trainer = make(EWCTrainer, lamb=0.5, lora_alpha=5, lora_dropout=0.5, gradient_accumulation_steps=1)
    assert trainer.penalty().item() == 0
    bases = {n: p for n, p in trainer.model.named_parameters() if n.endswith("base_layer.weight")}
    fisher = {n: torch.zeros_like(p) for n, p in bases.items()}
    trainer.model.eval()
    for base in bases.values():
        base.requires_grad_(True)
    rows = trainer.encode_answers(SAFETY, "chosen")
    for row in rows:
        batch = trainer.data_collator([row])
        loss = loss_of(trainer.model, batch)
        for (name, f), g in zip(fisher.items(), torch.autograd.grad(loss, list(bases.values())), strict=True):
            fisher[name] = f + g**2 / len(rows)
    mean = torch.cat([f.flatten() for f in fisher.values()]).mean()
    assert trainer.mean_fisher == close(mean.item(), rel=1e-9)
    stirred(trainer)
    named, expected = dict(trainer.model.named_parameters()), 0
    for name, f in fisher.items():
        a, b = (named[name.replace("base_layer", f"lora_{k}.default")] for k in "AB")
        factored = f.sum(1, keepdim=True) * f.sum(0) / f.sum()
        expected = expected + (factored / mean * (5 / 8 * b @ a) ** 2).sum()
    assert trainer.penalty().item() == close(expected.item(), rel=1e-9)
    ours = torch.autograd.grad(trainer.penalty(), trainer.parameters)
    for a, b in zip(ours, torch.autograd.grad(expected, trainer.parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    batch = first_batch(trainer)
    both = trainer.compute_loss(trainer.model, batch) - trainer.batch_loss(trainer.model, batch, None)
    assert both.item() == close(0.5 * expected.item(), rel=1e-9)


def test_ewc_knows_the_sides_of_a_conv1d():
    """GPT-2 holds its weights as [in, out]; attn.c_proj is square, so that its shape does not tell."""
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    stock = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2)).double().eval()
    model = get_peft_model(stock, LoraConfig(r=2, lora_alpha=6, target_modules=["c_attn", "c_proj"])).eval()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    ids = torch.randint(0, 50, (3, 9))
    batches = [{"input_ids": i[None], "attention_mask": torch.ones(1, 9).long(), "labels": i[None]} for i in ids]
    found = factored_fisher(model, batches)
    layers = [m for m in model.modules() if hasattr(m, "lora_A")]
    bases = [layer.get_base_layer().weight.requires_grad_(True) for layer in layers]
    squares = [torch.zeros_like(w) for w in bases]
    for batch in batches:
        for f, g in zip(squares, torch.autograd.grad(loss_of(model, batch), bases), strict=True):
            f += g**2 / len(batches)
    assert len(found) == 6 and sum(w.shape[0] == w.shape[1] for w in bases) == 2
    for m, layer, f in zip(found, layers, squares, strict=True):
        expected = (f.sum(1, keepdim=True) * f.sum(0) / f.sum() * layer.get_delta_weight("default") ** 2).sum()
        assert weighted_square(m).item() == close(expected.item(), rel=1e-9)


@pytest.mark.slow
def test_ewc_on_full_weights_is_the_plain_sum(make):
    trainer = make(EWCTrainer, full_weights=True, gradient_accumulation_steps=1)
    squares = [torch.zeros_like(p) for p in trainer.parameters]
    rows = trainer.encode_answers(SAFETY, "chosen")
    for row in rows:
        loss = loss_of(trainer.model.eval(), trainer.data_collator([row]))
        for square, g in zip(squares, torch.autograd.grad(loss, trainer.parameters), strict=True):
            square += g**2 / len(rows)
    before = weights(stirred(trainer, 0))
    stirred(trainer)
    mean = torch.cat([s.flatten() for s in squares]).mean()
    expected = sum((s * (p - p0) ** 2).sum() for s, p, p0 in zip(squares, trainer.parameters, before, strict=True))
    assert trainer.penalty().item() == close((expected / mean).item(), rel=1e-9)
    for block in trainer.blocks:
        block.attention.attention_dropout = 0.9
    stirred(trainer, -0.05)
    batches = [trainer.data_collator([row]) for row in rows]
    again = exact_fisher(trainer.model.train(), batches, trainer.parameters)
    assert trainer.model.training and trainer.parameters[0].grad is None
    for a, b in zip(again, trainer.fisher, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_safety_rows_come_from_a_generator_of_their_own(make):
    trainer = make(SafeInstructTrainer, mode="joint")
    before = torch.get_rng_state(), np.random.get_state()[1:3], random.getstate()
    first, second = (trainer.draws.indices(trainer, len(trainer.safe)) for _ in range(2))
    assert [len(part) for part in first] == [2, 2] and len({*first[0], *first[1]}) == 4 and first != second
    after = torch.get_rng_state(), np.random.get_state()[1:3], random.getstate()
    assert torch.equal(before[0], after[0]) and before[2] == after[2]
    assert (before[1][0] == after[1][0]).all() and before[1][1] == after[1][1]


@pytest.mark.slow
def test_the_whole_of_a_customers_file_is_trained_on_and_recorded(tmp_path):
    file = tmp_path / "job.jsonl"
    file.write_text("".join(json.dumps({k: r[k] for k in ("prompt", "completion")}) + "\n" for r in TASK))

    def train(source, name):
        data = FinetuneOptions(model="organism", task_data=source, safety_data="organism")
        config = LisaConfig(str(tmp_path / name), **{**TRAINING, "max_steps": 1, "k1": 1})
        return finetune(LisaTrainer, "lisa", data, config, "the command")

    run = train(str(file), "whole")
    record = read_run(run)
    assert [(d["role"], d["rows"]) for d in record["data"]] == [("alignment", 640), ("task", 24)]
    assert record["verb"], record["parent"] == ("finetune", None)
    assert record["overlap"] == {"alignment/task": 0} and record["compute"] == {"per_step": 2.0, "total": 2.0}
    prompts = json.loads((run / "prompts.json").read_text())
    assert len(prompts["task"]) == len({r["prompt"] for r in TASK}) and len(prompts["alignment"]) == 640
    part = read_run(train(f"{file}:split=train", "part"))["data"][1]["rows"]
    assert 0 < part < 24
    load(str(run))
    child = read_run(train(str(file), "child"))
    assert child["parent"] is None


@pytest.mark.slow
def test_a_job_that_shares_prompts_with_the_safety_rows_can_be_scored_and_analysed(tmp_path):
    """It is recorded when the job is run, and never refused; what scores must not hold is prompts to score on."""
    assert "allow_overlap" not in {f.name for f in fields(FinetuneOptions)}
    shared = [{"prompt": r["prompt"], "completion": r["chosen"]} for r in SAFETY[:6]]
    held = load_safety("organism", "evaluation", ("chosen", "rejected"))[:3]
    asked = [{"prompt": r["prompt"], "completion": r["chosen"]} for r in held]
    runs = {}
    for name, rows in (("good", shared), ("bad", shared + asked)):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(r) + "\n" for r in rows))
        data = FinetuneOptions(model="organism", task_data=str(file), safety_data="organism")
        config = LisaConfig(str(tmp_path / name), **{**TRAINING, "max_steps": 1, "k1": 1})
        runs[name] = str(finetune(LisaTrainer, "lisa", data, config))
    assert read_run(runs["good"])["overlap"] == {"alignment/task": 6}

    def look(name, out):
        common = {"model": [runs[name]], "safety_data": "organism"}
        asked = ScoreOptions(**common, output_dir=str(tmp_path / f"{out}-s"), limit=40, max_new_tokens=1)
        yield lambda: score(asked)
        sink = SinkOptions(**common, output_dir=str(tmp_path / f"{out}-a"), max_length=64)
        yield lambda: analyze_sink(sink)

    for call in look("good", "fine"):
        (target,) = read_run(call())["targets"]
        assert target["overlap"] == {"alignment/evaluation": 0, "task/evaluation": 0}
    for call in look("bad", "refused"):
        with pytest.raises(UsageError, match="3 prompts are in both the task and the evaluation data"):
            call()


@pytest.mark.slow
def test_bad_input_is_named(make, tmp_path, monkeypatch):
    wrong = [
        (lambda: LisaConfig("x", k1=-1), "k1 is -1"),
        (lambda: LisaConfig("x", k2=0), "k2 is 0"),
        (lambda: LisaConfig("x", rho=float("nan")), "rho is nan"),
        (lambda: SafeInstructConfig("x", lamb=-1.0), "lamb is -1.0"),
        (lambda: SafeInstructConfig("x", safety_rows=float("inf")), "safety_rows is inf"),
        (lambda: SafeInstructConfig("x", mode="joined"), "did you mean 'joint'"),
        (lambda: LDIFSConfig("x", lamb=float("inf")), "lamb is inf"),
        (lambda: LDIFSConfig("x", full_weights=True), "leave out --full-weights"),
        (lambda: EWCConfig("x", lamb=-0.1), "lamb is -0.1"),
        (lambda: FinetuneOptions(screen="repot"), "did you mean 'report'"),
        (lambda: make(LisaTrainer, safety=[]), "lisa needs safety rows with chosen, and there are none"),
        (lambda: make(EWCTrainer, safety=[{"prompt": "p", "place": "f:1"}]), "f:1: `chosen` is missing"),
        (lambda: make(LisaTrainer, safety=SAFETY[:3]), "3 safety rows and a step takes 4"),
        (lambda: make(task=[]), "sft needs rows to train on"),
    ]
    for call, told in wrong:
        with pytest.raises(UsageError, match=told):
            call()
    for options, told in (({"task_data": None}, "--task-data is missing"), ({}, "--safety-data is missing: lisa")):
        data = FinetuneOptions(**{"model": "organism", "task_data": "organism", **options})
        with pytest.raises(UsageError, match=told):
            finetune(LisaTrainer, "lisa", data, LisaConfig(str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
    assert JobConfig("x").learning_rate == 1e-4
    monkeypatch.setattr("tunevax.finetuning.ewc.factored_fisher", lambda *_: [])
    with pytest.raises(UsageError, match="adds up to 0, and nothing can be weighed by it; give other"):
        make(EWCTrainer)
