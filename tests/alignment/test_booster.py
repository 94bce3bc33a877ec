"""Booster against reference numbers, and its harmful gradient under accumulation, resume and failure."""

import json

import numpy as np
import pytest
import torch
from tiny import (
    GOLDEN,
    GOLDEN_RTOL,
    TinyTokenizer,
    assert_gradients,
    batch,
    encoded,
    gradients,
    rows,
    tiny_llama,
    tiny_lora,
)

import tunevax.alignment.booster as booster
import tunevax.alignment.sft as sft
from tunevax.alignment.booster import BoosterConfig, BoosterTrainer
from tunevax.errors import RunError, UsageError
from tunevax.modeling.draws import Draws

pytestmark = pytest.mark.numerical

close = pytest.approx
EXPECTED = GOLDEN["booster"]


@pytest.fixture
def make(monkeypatch, tmp_path):
    """A trainer on the golden batches, already encoded."""
    encoded(monkeypatch, c=rows("safe"), r=rows("harmful"))

    def build(cls=BoosterTrainer, model=None, **options):
        options = {
            "output_dir": str(tmp_path),
            "per_device_train_batch_size": 4,
            "checkpoint_blocks": "none",
            **options,
        }
        data = [{"prompt": "p", "chosen": "c", "rejected": "r"}]
        trainer = cls(
            model or tiny_lora(), cls.config_class(**options), safety_data=data, processing_class=TinyTokenizer()
        )
        trainer.state.global_step = 0
        trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
        return trainer

    return build


def step(trainer, parts=(slice(0, 4),)):
    """One optimiser step's micro-batches; the sum of their losses."""
    inputs = batch("safe")
    items = (inputs["labels"][:, 1:] != -100).sum()
    return sum(trainer.training_step(trainer.model, {k: v[p] for k, v in inputs.items()}, items).item() for p in parts)


def grads(trainer):
    return {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.slow
def test_matches_reference(make):
    trainer = make(lamb=EXPECTED["lamb"], alpha=EXPECTED["alpha"])
    assert step(trainer) == close(EXPECTED["f"], rel=GOLDEN_RTOL)
    noted = {k: v[-1] for k, v in trainer._metrics.items()}
    assert noted == close(
        {
            "harmful_loss": EXPECTED["h"],
            "harmful_loss_after": EXPECTED["h_plus"],
            "harmful_grad_norm": EXPECTED["harmful_grad_norm"],
        },
        rel=GOLDEN_RTOL,
    )
    assert_gradients(gradients(trainer.model), EXPECTED["grads"], GOLDEN_RTOL)
    plain = make(sft.SFTTrainer)
    step(plain)
    ours, theirs = (torch.cat([g.flatten() for g in grads(t).values()]) for t in (trainer, plain))
    assert ours.norm().item() == close(EXPECTED["total_norm"], rel=GOLDEN_RTOL)
    assert theirs.norm().item() == close(EXPECTED["sft_norm"], rel=GOLDEN_RTOL)
    assert torch.cosine_similarity(ours, theirs, dim=0).item() == close(EXPECTED["cos_to_sft"], rel=GOLDEN_RTOL)
    named = zip(grads(trainer).items(), grads(plain).values(), strict=True)
    found = {n: torch.cosine_similarity(a.flatten(), b.flatten(), dim=0).item() for (n, a), b in named}
    short = {n.replace("base_model.model.model.", "").replace(".default.weight", ""): c for n, c in found.items()}
    assert short == close(EXPECTED["cos_per_param"], rel=GOLDEN_RTOL, abs=1e-4)
    swapped = GOLDEN["wrong_implementations_must_differ"]["booster_minus_plus_swapped_total_norm"]
    assert ours.norm().item() != close(swapped, rel=1e-2)


@pytest.mark.slow
def test_the_gradient_after_the_harmful_step_matches_reference(make):
    """From what is applied: g - g+ at lamb 1, and g by itself."""
    trainer = make(lamb=1.0)
    difference = trainer.harmful_gradient()
    batches = [batch("harmful")]
    _, g = booster.gradient_of(trainer, batches)
    flat = [torch.cat([d[p].flatten() for p in trainer.parameters]) for d in (g, difference)]
    g_plus = flat[0] - flat[1]
    assert g_plus.norm().item() == close(EXPECTED["harmful_grad_norm_plus"], rel=GOLDEN_RTOL)
    assert torch.cosine_similarity(flat[0], g_plus, dim=0).item() == close(EXPECTED["cos_h_hplus"], rel=GOLDEN_RTOL)


@pytest.mark.slow
@pytest.mark.parametrize("knob", ["lamb", "alpha"])
@pytest.mark.parametrize("full", [False, True])
def test_knob_at_zero_is_sft(make, knob, full):
    models = [tiny_llama() if full else tiny_lora() for _ in range(2)]
    plain = make(sft.SFTTrainer, model=models[0], full_weights=full)
    ours = make(model=models[1], full_weights=full, **{knob: 0.0})
    assert step(plain) == step(ours)
    assert grads(plain).keys() == grads(ours).keys()
    for name, g in grads(plain).items():
        assert torch.equal(g, grads(ours)[name]), name


@pytest.mark.slow
def test_on_top_of_vaccine(make):
    """The sum of Vaccine's gradient and Booster's own term, both from the reference."""
    trainer, plain = make(rho=2.0), make(sft.SFTTrainer)
    assert step(trainer) == close(GOLDEN["vaccine"]["pass2_loss"], rel=GOLDEN_RTOL)
    step(plain)
    alone = make()
    step(alone)
    term = {n: g - grads(plain)[n] for n, g in grads(alone).items()}
    for name, parameter in trainer.model.named_parameters():
        if parameter.grad is not None:
            parameter.grad -= term[name]
    assert_gradients(gradients(trainer.model), GOLDEN["vaccine"]["grads"], GOLDEN_RTOL)


@pytest.mark.slow
@pytest.mark.parametrize("fails", [False, True])
def test_weights_come_back_bit_for_bit(make, monkeypatch, fails):
    trainer = make(alpha=0.3)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    moved = []
    original = booster.gradient_of

    def watch(*args):
        moved.append(any(not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True)))
        if fails and len(moved) == 2:
            raise RuntimeError("boom")
        return original(*args)

    monkeypatch.setattr(booster, "gradient_of", watch)
    if fails:
        with pytest.raises(RuntimeError, match="boom"):
            trainer.harmful_gradient()
    else:
        trainer.harmful_gradient()
    assert moved == [False, True]
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in trainer.model.modules())


@pytest.mark.slow
@pytest.mark.parametrize("rho", [0.0, 2.0])
def test_gradients_add_up(make, rho):
    """Micro-batches of 2 rows, two to a step, against the whole step at once; and next to what is in `.grad`."""
    halves = make(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    whole = make()
    assert step(halves, (slice(0, 2), slice(2, 4))) == close(step(whole), rel=1e-9)
    for name, g in grads(whole).items():
        torch.testing.assert_close(grads(halves)[name], g, rtol=1e-9, atol=1e-12)
    trainer = make(rho=rho)
    step(trainer)
    once = grads(trainer)
    trainer.state.global_step = 1
    step(trainer)
    for name, g in grads(trainer).items():
        torch.testing.assert_close(g, 2 * once[name], rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_recomputation_changes_nothing(make):
    kept = make()
    step(kept)
    for mode in ("elementwise", "all"):
        trainer = make(checkpoint_blocks=mode)
        step(trainer)
        assert all(torch.equal(a, b) for a, b in zip(grads(kept).values(), grads(trainer).values(), strict=True))


@pytest.mark.slow
def test_no_dropout_and_no_other_generator_in_the_harmful_passes(make):
    model = tiny_lora()
    for module in model.modules():
        if "lora_dropout" in getattr(module, "__dict__", {}).get("_modules", {}):
            module.lora_dropout["default"] = torch.nn.Dropout(0.5)
    trainer = make(model=model, alpha=0.0)  # w+ is w, so g+ is g unless the masks differ
    trainer.model.train()
    torch.manual_seed(0), np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    assert all((g == 0).all() for g in trainer.harmful_gradient().values())
    assert torch.equal(before[0], torch.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()


@pytest.mark.slow
def test_harmful_rows_are_drawn_once_per_step_and_shared_out(make, monkeypatch):
    trainer = make(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    trainer.draws.indices(trainer, 40)  # the stream goes on
    state = json.loads(json.dumps(trainer.draws.state()))
    first = trainer.draws.indices(trainer, 40)
    assert [len(part) for part in first] == [2, 2] and len({*first[0], *first[1]}) == 4
    again = Draws(seed=7)
    again.load(state)
    assert again.indices(trainer, 40) == first != trainer.draws.indices(trainer, 40)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(BoosterConfig, "world_size", 2)
        monkeypatch.setattr(BoosterConfig, "process_index", rank)
        draws = Draws(seed=1)
        shares += [i for part in draws.indices(trainer, 40) for i in part]
    assert len(set(shares)) == 8  # the ranks take different rows of one draw
    monkeypatch.undo()
    calls = []
    monkeypatch.setattr(trainer, "harmful_gradient", lambda: calls.append(trainer.state.global_step) or {})
    for number in (0, 1):
        trainer.state.global_step = number
        step(trainer, (slice(0, 2), slice(2, 4)))
    assert calls == [0, 1]


def test_rejected_is_stepped_on_and_chosen_is_trained(make):
    trainer = make()
    assert (trainer.harmful, trainer.train_dataset) == (rows("harmful"), rows("safe"))


@pytest.mark.slow
def test_cost_in_sft_steps(make):
    assert make().cost() == 3 and make(rho=2.0).cost() == 4 and make(rho=2.0, perturbation="random").cost() == 3
    assert make(model=tiny_llama(), full_weights=True).cost() == 3
    assert make(model=tiny_llama(), full_weights=True, rho=2.0).cost() == close(2 + 5 / 3)


@pytest.mark.slow
def test_what_cannot_be_is_refused(make):
    for options, told in (({"lamb": -1.0}, "lamb is -1.0"), ({"alpha": float("nan")}, "alpha is nan")):
        with pytest.raises(UsageError, match=told):
            BoosterConfig(output_dir="x", **options)
    with pytest.raises(UsageError, match="there are 4 harmful rows and a step takes 6"):
        make(per_device_train_batch_size=3, gradient_accumulation_steps=2)
    with pytest.raises(UsageError, match="`rejected` is missing, and booster needs it"):
        BoosterTrainer(
            tiny_lora(),
            BoosterConfig("x"),
            safety_data=[{"prompt": "p", "chosen": "c"}],
            processing_class=TinyTokenizer(),
        )
    trainer = make()
    trainer.parameters[0].data.fill_(float("nan"))
    with pytest.raises(RunError, match="harmful gradient is not finite at step 0"):
        trainer.harmful_gradient()
