"""Pharmacist: the gradient of the rows' weights in each mode, against what it claims to be the gradient of."""

import math

import pytest
import torch
from tiny import in_float64, loss_of
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tunevax.curation.pharmacist import UPPER, PharmacistConfig, PharmacistTrainer, along
from tunevax.data.encoding import collate
from tunevax.modeling import load
from tunevax.modeling.loss import row_losses
from tunevax.modeling.memory import StepMemory
from tunevax.modeling.trainer import ResponseTrainer, TrainConfig
from tunevax.organism import World, path

pytestmark = pytest.mark.numerical


def trainer_for(tmp_path, rows=None, validation=None, start_random=True, dtype=torch.float64, **options):
    """On the organism, its adapter off zero, so that both factors have a gradient."""
    model, tokenizer, _ = load("organism")
    if dtype == torch.float64:
        in_float64(model)
    world = World()
    rows = rows or world.safety("alignment")[:12]
    validation = validation or world.safety("validation")[:8]
    settings = {"per_device_train_batch_size": 4, "max_length": 64, "checkpoint_blocks": "none", "seed": 5, **options}
    trainer = PharmacistTrainer(
        model, PharmacistConfig(str(tmp_path), **settings), safety_data=rows, validation_data=validation,
        processing_class=tokenizer,
    )  # fmt: skip
    if start_random:
        generator = torch.Generator().manual_seed(0)
        for parameter in trainer.parameters:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter) * 0.05
    return trainer


def batch_of(trainer, count):
    return {
        k: v for k, v in trainer.data_collator([trainer.train_dataset[i] for i in range(count)]).items() if k != "index"
    }


def gradients(trainer, loss):
    return torch.autograd.grad(loss, trainer.parameters)


def dot(first, second):
    return sum((a.double() * b.double()).sum() for a, b in zip(first, second, strict=True))


@pytest.mark.slow
def test_row_losses_are_those_of_each_row_alone(tmp_path):
    trainer = trainer_for(tmp_path)
    batch = batch_of(trainer, 4)
    weights = torch.tensor([0.5, 2.0, 0.0, 1.0], dtype=torch.float64)
    total, each = row_losses(trainer.model, batch, weights)
    alone = []
    for i in range(4):
        n = int(batch["attention_mask"][i].sum())
        alone.append(loss_of(trainer.model, {k: v[i : i + 1, :n] for k, v in batch.items()}))
    assert torch.allclose(each, torch.stack(alone), rtol=1e-9)
    expected = gradients(trainer, (weights * torch.stack(alone)).sum())
    for ours, theirs in zip(gradients(trainer, total), expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_along_gives_each_rows_gradient_times_a_direction(tmp_path):
    trainer = trainer_for(tmp_path)
    batch = batch_of(trainer, 4)
    generator = torch.Generator().manual_seed(1)
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in trainer.parameters]
    with along(trainer.model, direction, 4) as products:
        total, _ = row_losses(trainer.model, batch)
        gradients(trainer, total)
    for i, found in enumerate(products):
        one, _ = row_losses(trainer.model, {k: v[i : i + 1] for k, v in batch.items()})
        assert found.item() == pytest.approx(dot(gradients(trainer, one), direction).item(), rel=1e-9)
    assert not any(m._forward_hooks for m in trainer.model.modules())


def omega_gradient(trainer, judged, index=(0, 1)):
    """What `step_selector` leaves on omega."""
    trainer.step_selector(torch.tensor(index), judged)
    return trainer.omega.grad.double()


def finite_difference(function, at, width=1e-3):
    found = []
    for i in range(len(at)):
        shift = torch.zeros_like(at)
        shift[i] = width
        found.append((function(at + shift) - function(at - shift)) / (2 * width))
    return torch.stack(found)


def p_of(omega):
    return len(omega) * torch.softmax(omega, 0)


OMEGA = torch.tensor([0.3, -0.2], dtype=torch.float64)
TWO = World().safety("alignment")[:2]


def close(ours, theirs):
    return torch.linalg.norm(ours - theirs) <= 1e-3 * torch.linalg.norm(theirs)


@pytest.mark.slow
def test_single_is_the_gradient_of_the_weighted_loss(tmp_path):
    trainer = trainer_for(tmp_path, TWO, mode="single", per_device_train_batch_size=2)
    trainer.omega.data = OMEGA.float()
    _, losses = row_losses(trainer.model, batch_of(trainer, 2))

    def objective(omega):
        return (p_of(omega) * losses.double()).mean()

    assert close(omega_gradient(trainer, losses), finite_difference(objective, OMEGA))


def norm_in_float64(norm, x):
    """The stock norm rounds to float32, which is noise as large as the differences here."""
    return norm.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon)


@pytest.mark.slow
def test_unrolled_is_the_gradient_of_the_upper_loss_after_one_step(tmp_path, monkeypatch):
    """F(w) = L_up(theta - eta * grad of the mean p_i(w) l_i), by stock losses in float64; up to the factor eta."""
    trainer = trainer_for(tmp_path, TWO, mode="unrolled", per_device_train_batch_size=2)
    trainer.omega.data = OMEGA.float()
    batch, validation = batch_of(trainer, 2), collate(trainer.validation[:4], 0)
    _, upper_gradient = UPPER["refusal"](trainer, validation)
    with along(trainer.model, upper_gradient, 2) as products:
        trainer.gradient(batch, torch.ones(2))
    ours = omega_gradient(trainer, -products)

    monkeypatch.setattr(LlamaRMSNorm, "forward", norm_in_float64)
    eta, model = 1e-6, trainer.model.double()
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    theta = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    def losses(parameters, rows):
        logits = torch.func.functional_call(
            model, parameters, (), {k: rows[k] for k in ("input_ids", "attention_mask")}
        )
        logits, labels = logits.logits[:, :-1], rows["labels"][:, 1:]
        each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
        return each.sum(1) / (labels != -100).sum(1)

    leaves = {n: t.requires_grad_() for n, t in theta.items()}
    rows = [torch.autograd.grad(losses(leaves, batch)[i], list(leaves.values())) for i in range(2)]

    def objective(omega):
        p = p_of(omega)
        step = [eta * (p[0] * a + p[1] * b) / 2 for a, b in zip(*rows, strict=True)]
        moved = {n: theta[n].detach() - s for n, s in zip(names, step, strict=True)}
        with torch.no_grad():
            return losses(moved, validation).mean()

    theirs = finite_difference(objective, OMEGA) / eta
    assert close(ours, theirs), (ours, theirs)


@pytest.mark.slow
def test_double_is_the_gradient_of_the_penalty(tmp_path):
    """F(w) = mean p_i l_i(theta) - min over theta' of mean p_i l_i(theta'). For one prompt with two one-token answers
    the minimum is known: l_i = -log(p_i / (p_1 + p_2)) for that token and 0 for the end of the turn."""
    tokenizer = AutoTokenizer.from_pretrained(path())
    torch.manual_seed(0)
    shape = dict(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2
    )
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape))
    rows = [{"prompt": "how do i make a", "chosen": word} for word in ("sun", "rain")]
    config = PharmacistConfig(
        str(tmp_path), mode="double", per_device_train_batch_size=2, learning_rate=1e-2, checkpoint_blocks="none",
        lora_targets="all-linear", max_grad_norm=10.0,
    )  # fmt: skip
    model.get_output_embeddings().weight.data *= 20  # a head wide enough for any answer
    trainer = PharmacistTrainer(model, config, safety_data=rows, validation_data=rows, processing_class=tokenizer)
    trainer.omega.data = OMEGA.float()
    batch = batch_of(trainer, 2)
    p = p_of(OMEGA).float()
    for rate, steps in ((1e-2, 300), (1e-3, 300), (1e-4, 300)):
        trainer.follower_optimizer.param_groups[0]["lr"] = rate
        for _ in range(steps):
            followed = trainer.follow(batch, p / 2)
    best = -torch.log(p_of(OMEGA) / 2)
    assert torch.allclose(followed.double() * 2, best, atol=5e-4)  # two tokens an answer: the word and the end

    _, losses = row_losses(trainer.model, batch)

    def objective(omega):
        p = p_of(omega)
        return (p * losses.double()).mean() - (p * -torch.log(p / 2) / 2).mean()

    assert close(omega_gradient(trainer, losses - followed), finite_difference(objective, OMEGA))


@pytest.mark.slow
def test_after_attack_is_the_gradient_at_the_attacked_point(tmp_path):
    trainer = trainer_for(tmp_path, upper="after-attack")
    validation = collate(trainer.validation[:4], 0)
    state = trainer.generator.get_state()
    harmful = trainer.drawn(trainer.harmful)
    trainer.generator.set_state(state)
    before = [p.detach().clone() for p in trainer.parameters]
    value, ours = UPPER["after-attack"](trainer, validation)
    assert all(torch.equal(p, b) for p, b in zip(trainer.parameters, before, strict=True))
    step = gradients(trainer, row_losses(trainer.model, harmful, torch.full((4,), 0.25, dtype=torch.float64))[0])
    norm = math.sqrt(dot(step, step))
    for parameter, g in zip(trainer.parameters, step, strict=True):
        parameter.data -= trainer.args.attack_step * g / norm
    loss, _ = row_losses(trainer.model, validation, torch.full((4,), 0.25, dtype=torch.float64))
    assert value.item() == pytest.approx(loss.item(), rel=1e-9)
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(ours, gradients(trainer, loss), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["double", "unrolled"])
def test_a_resumed_run_gives_the_same_weights_to_the_rows(tmp_path, mode):
    rows = World().safety("alignment")[:18]  # an interruption inside an epoch
    whole = trainer_for(tmp_path / "a", rows, mode=mode, max_steps=6, save_steps=3, start_random=False)
    whole.args.save_total_limit = None
    whole.train()
    resumed = trainer_for(tmp_path / "b", rows, mode=mode, max_steps=6, save_steps=3, start_random=False)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert not torch.equal(whole.omega, torch.full_like(whole.omega, 0.1))
    assert torch.equal(whole.omega, resumed.omega)


@pytest.mark.slow
def test_wrong_answers_end_below_right_ones(tmp_path):
    """The sign of the whole: every fourth row complies."""
    rows = World().safety("alignment")[:60]
    rows = [{**row, "chosen": row["rejected"]} if i % 4 == 0 else row for i, row in enumerate(rows)]
    validation = World().safety("validation")[:40]
    trainer = trainer_for(tmp_path, rows, validation, per_device_train_batch_size=8, max_steps=30, start_random=False)
    trainer.train()
    wrong, right = trainer.omega[::4], trainer.omega[[i for i in range(60) if i % 4]]
    assert (right[:, None] > wrong).float().mean() > 0.95


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "adapters"), [("single", 1), ("unrolled", 1), ("double", 3)])
def test_memory_above_sft_is_counted_in_adapters(tmp_path, mode, adapters):
    """One for the upper gradient; of `double` theta' and its two moments, where the gradients are freed in time."""
    peaks = []
    for trainer in (None, mode):
        memory, options = StepMemory(), {"max_steps": 1, "start_random": False, "per_device_train_batch_size": 10}
        made = trainer_for(tmp_path, mode=mode, dtype=torch.float32, **options)
        if trainer is None:
            args = TrainConfig(str(tmp_path), max_steps=1, checkpoint_blocks="none", per_device_train_batch_size=10)
            rows = [{k: row[k] for k in ("input_ids", "labels")} for row in made.train_dataset]
            made = ResponseTrainer(load("organism").model, args, rows, made.processing_class)
        made.add_callback(memory)
        made.train()
        peaks.append(memory.peak)
    size = sum(p.numel() * 4 for p in made.parameters)
    assert peaks[1] - peaks[0] <= (adapters + 0.1) * size
