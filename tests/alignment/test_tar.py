"""TAR against gradients assembled by hand from the definitions, on the stock model without any of its shortcuts."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from tiny import TinyTokenizer, batch, encoded, rows, tiny_llama, tiny_lora

import tunevax.alignment.sft as sft
import tunevax.alignment.tar as tar
from tunevax.alignment.align import AlignOptions, align
from tunevax.alignment.tar import TARConfig, TARTrainer, held_out
from tunevax.data import load_safety
from tunevax.data.encoding import collate
from tunevax.data.splits import split_of
from tunevax.errors import RunError, UsageError
from tunevax.modeling.draws import Draws
from tunevax.records import read_run

pytestmark = pytest.mark.numerical

close = pytest.approx
OPTIONS = {
    "per_device_train_batch_size": 4, "checkpoint_blocks": "none", "mapping_steps": 0, "inner_steps": 4,
    "inner_learning_rates": "1e-2", "tamper_interval": 2,
}  # fmt: skip


def prompts(out, count=4):
    return [p for p in map(str, range(200)) if held_out(p) is out][:count]


# The inner attack trains on the golden harmful rows; what is held out is the safe rows, as if they were harmful.
DATA = [{"prompt": p, "chosen": "c", "rejected": "r"} for p in prompts(False) + prompts(True)]
ENCODED = {"r": rows("harmful") + rows("safe"), "c": rows("safe") + rows("harmful")}


@pytest.fixture
def make(monkeypatch, tmp_path):
    encoded(monkeypatch, **ENCODED)

    def build(cls=TARTrainer, model=None, **options):
        own = {k: v for k, v in OPTIONS.items() if cls is TARTrainer or k in sft.SFTConfig.__dataclass_fields__}
        trainer = cls(
            model or tiny_lora(), cls.config_class(str(tmp_path), **{**own, **options}), safety_data=DATA,
            processing_class=TinyTokenizer(),
        )  # fmt: skip
        trainer.state.global_step, trainer.state.max_steps = 0, 10
        trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
        return trainer

    return build


def step(trainer, parts=(slice(0, 4),)):
    inputs = batch("safe")
    items = (inputs["labels"][:, 1:] != -100).sum()
    return sum(trainer.training_step(trainer.model, {k: v[p] for k, v in inputs.items()}, items).item() for p in parts)


def grads(trainer):
    return {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


def assert_same(found, expected, rel=1e-9):
    """Each tensor within `rel` of its norm."""
    assert found.keys() == expected.keys()
    for name, g in expected.items():
        assert (found[name] - g).norm() <= rel * g.norm() + 1e-12, (name, found[name].norm(), g.norm())


def trainable(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def forward(model, inputs):
    output = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], output_hidden_states=True)
    return output.logits[:, :-1].log_softmax(-1), inputs["labels"][:, 1:], output.hidden_states


def cross_entropy(model, inputs):
    log_p, labels, _ = forward(model, inputs)
    return F.nll_loss(log_p.flatten(0, 1), labels.flatten(), ignore_index=-100)


def entropy_loss(model, inputs):
    log_p, labels, _ = forward(model, inputs)
    return (log_p.exp() * log_p).sum(-1)[labels != -100].mean()


def answer_likelihood(model, inputs):
    log_p, labels, _ = forward(model, inputs)
    return (log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels != -100)).sum(1)


def attack_by_hand(model, kind, *, steps=4, every=2, rate=1e-2, weight=4.0, schedule=1 / 16):
    """G for `model`, whose weights end up attacked. In float64: the reference should not add its own rounding."""
    parameters = trainable(model)

    def margin():
        return answer_likelihood(model, batch("harmful")) - answer_likelihood(model, batch("safe"))

    with torch.no_grad():
        at_start = margin()
    optimizer = torch.optim.AdamW(parameters.values(), lr=rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    total = {n: torch.zeros_like(p) for n, p in parameters.items()}
    for k in range(steps):
        optimizer.zero_grad()
        cross_entropy(model, batch("harmful")).backward()
        optimizer.step()
        if k % every == every - 1:
            model.zero_grad()
            loss = (
                entropy_loss(model, batch("safe"))
                if kind == "entropy"
                else -F.logsigmoid(0.1 * (margin() - at_start)).mean()
            )
            loss.backward()
            for n, p in parameters.items():
                total[n] += weight * math.exp(schedule * (k - steps + 1)) * p.grad
    return total


@pytest.mark.parametrize("kind", ["entropy", "preference"])
@pytest.mark.parametrize("full", [False, True])
def test_applied_gradient_is_the_hand_assembled_one(make, kind, full):
    build = tiny_llama if full else tiny_lora
    trainer = make(model=build(), full_weights=full, tamper_loss=kind, lambda_representation=0.0)
    loss = step(trainer)
    plain = build()
    for parameter in plain.parameters():
        parameter.requires_grad_(parameter.requires_grad or full)
    retain = cross_entropy(plain, batch("safe"))
    retain.backward()
    assert loss == close(retain.item(), rel=1e-9)
    outcome = attack_by_hand(build().requires_grad_(True) if full else build(), kind)
    applied = {n: g - plain.get_parameter(n).grad for n, g in grads(trainer).items()}
    norm = sum(g.norm() ** 2 for g in outcome.values()) ** 0.5
    assert norm > 0.05 and trainer._metrics["tamper_grad_norm"][-1] == close(norm.item(), rel=1e-9)
    difference = sum((applied[n] - g).norm() ** 2 for n, g in outcome.items()) ** 0.5
    assert difference < 1e-6 * norm  # AdamW's first steps are signs: rounding near zero shows
    assert trainer._metrics["inner_loss_last"][-1] < trainer._metrics["inner_loss_first"][-1]


def test_weights_of_the_outcomes_have_the_closed_form(make, monkeypatch):
    """Geometric sums: 64 inner steps, every 4th and every one, lambda_tr 4."""
    for every, expected in ((4, 4 * (1 - math.exp(-4)) / (1 - math.exp(-1 / 4))),
                            (1, 4 * (1 - math.exp(-4)) / (1 - math.exp(-1 / 16)))):  # fmt: skip
        trainer = make(inner_steps=64, tamper_interval=every)
        one = {p: torch.ones_like(p) for p in trainer.parameters[:1]}
        monkeypatch.setattr(
            tar, "gradient_of", lambda *_, one=one: (torch.ones(()), {k: v.clone() for k, v in one.items()})
        )
        (total,) = trainer.tamper_gradient().values()
        assert total.mean().item() == close(expected, rel=1e-9)
    assert round(expected, 1) == 64.8


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["entropy", "preference"])
def test_weights_and_gradients_come_back_bit_for_bit(make, monkeypatch, kind):
    trainer = make(tamper_loss=kind)
    step(trainer)
    weights, before = [p.detach().clone() for p in trainer.model.parameters()], grads(trainer)
    moved, original = [], tar.gradient_of

    def watch(*args):
        moved.append(any(not torch.equal(a, b) for a, b in zip(weights, trainer.model.parameters(), strict=True)))
        return original(*args)

    monkeypatch.setattr(tar, "gradient_of", watch)
    trainer.tamper_gradient()
    assert moved == [False, True, True, True, True, True]  # four steps, an outcome after every second
    assert all(torch.equal(a, b) for a, b in zip(weights, trainer.model.parameters(), strict=True))
    assert all(torch.equal(before[n], g) for n, g in grads(trainer).items())
    monkeypatch.setattr(
        tar, "gradient_of", lambda *args: moved.append(1) or (original(*args) if len(moved) < 9 else 1 / 0)
    )
    with pytest.raises(ZeroDivisionError):
        trainer.tamper_gradient()
    assert all(torch.equal(a, b) for a, b in zip(weights, trainer.model.parameters(), strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in trainer.model.modules())


@pytest.mark.slow
def test_each_attack_starts_afresh(make):
    trainer = make()
    first, second = trainer.tamper_gradient(), trainer.tamper_gradient()
    difference = sum((first[p] - second[p]).norm() ** 2 for p in first) ** 0.5
    assert difference < 1e-3 * tar.norm_of(first)  # the same rows in another order, so not the same bits


@pytest.mark.slow
@pytest.mark.parametrize("full", [False, True])
def test_knobs_at_zero_are_sft(make, full):
    models = [tiny_llama() if full else tiny_lora() for _ in range(2)]
    plain = make(sft.SFTTrainer, model=models[0], full_weights=full)
    ours = make(model=models[1], full_weights=full, lambda_tr=0.0, lambda_representation=0.0)
    assert step(plain) == step(ours)
    assert grads(plain).keys() == grads(ours).keys()
    assert all(torch.equal(g, grads(ours)[n]) for n, g in grads(plain).items())


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", "all"])
@pytest.mark.parametrize("full", [False, True])
def test_retain_loss_by_hand(make, mode, full):
    """Cross entropy and the mean over all 9 hidden states and the response's positions of the L2 distance."""
    build = tiny_llama if full else tiny_lora
    trainer = make(model=build(), full_weights=full, lambda_tr=0.0, lambda_representation=0.7, checkpoint_blocks=mode)
    _, labels, before = forward(build(), batch("safe"))
    generator = torch.Generator().manual_seed(5)
    moves = {n: 0.05 * torch.randn(p.shape, generator=generator) for n, p in trainable(trainer.model).items()}
    plain = build()
    with torch.no_grad():
        for name, move in moves.items():
            trainer.model.get_parameter(name).add_(move)
            plain.get_parameter(name).add_(move)
    for parameter in plain.parameters():
        parameter.requires_grad_(parameter.requires_grad or full)
    loss = step(trainer)
    _, _, after = forward(plain, batch("safe"))
    mask = labels != -100
    distance = (
        sum(
            torch.linalg.vector_norm(a[:, :-1][mask] - b[:, :-1][mask].detach(), dim=-1).mean()
            for a, b in zip(after, before, strict=True)
        )
        / 9
    )
    expected = cross_entropy(plain, batch("safe")) + 0.7 * distance
    expected.backward()
    assert distance > 0.1 and loss == close(expected.item(), rel=1e-9)
    assert trainer._metrics["representation_distance"][-1] == close(distance.item(), rel=1e-9)
    assert_same(grads(trainer), {n: p.grad for n, p in plain.named_parameters() if p.grad is not None})


def test_the_first_step_has_no_distance_and_finite_gradients(make):
    with_term, without = make(lambda_tr=0.0), make(lambda_tr=0.0, lambda_representation=0.0)
    assert step(with_term) == close(step(without), rel=1e-9)
    assert_same(grads(with_term), grads(without), rel=1e-9)


def test_random_mapping_by_hand(make):
    """1 - |cos| with the vector of each response token, at every hidden state; then TAR begins."""
    trainer = make(mapping_steps=3, seed=11, lambda_representation=0.5)
    loss = step(trainer)
    table = torch.randn(97, 64, generator=torch.Generator().manual_seed(11))
    plain = tiny_lora()
    retain = cross_entropy(plain, batch("safe"))
    # All eight rows may be mapped; four are drawn.
    drawn = Draws(11).indices(trainer, 8)[0]
    forget = collate([ENCODED["r"][i] for i in drawn], 2)
    _, _, states = forward(plain, forget)
    mask = forget["labels"] != -100
    vectors = table[forget["input_ids"][mask]]
    mapped = sum((1 - F.cosine_similarity(s[mask], vectors, dim=-1).abs()).mean() for s in states) / 9
    (retain + mapped).backward()
    assert loss == close(retain.item(), rel=1e-9)
    assert trainer._metrics["mapping_loss"][-1] == close(mapped.item(), rel=1e-9)
    assert_same(grads(trainer), {n: p.grad for n, p in plain.named_parameters() if p.grad is not None})
    kinds = []
    for number in range(5):
        trainer.state.global_step = number
        kinds.append(trainer.mapping())
    assert kinds == [True, True, True, False, False]
    trainer.args.mapping_steps, trainer.state.max_steps, trainer.state.global_step = 0.3, 10, 3
    assert not trainer.mapping()
    trainer.state.global_step = 2
    assert trainer.mapping()


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"tamper_loss": "preference"}, {"mapping_steps": 2}])
def test_gradients_add_up(make, options):
    # A learning rate at which AdamW does not turn rounding into signs.
    halves = make(per_device_train_batch_size=2, gradient_accumulation_steps=2, inner_learning_rates="1e-3", **options)
    whole = make(inner_learning_rates="1e-3", **options)
    with torch.no_grad():
        for trainer in (halves, whole):
            for parameter in trainer.parameters:
                parameter.mul_(1.1)  # away from the start, where the distance is zero
    assert step(halves, (slice(0, 2), slice(2, 4))) == close(step(whole), rel=1e-9)
    assert_same(grads(halves), grads(whole), rel=1e-9)
    # Noted once a step, but the distance once a batch; a step is either mapping or tampering.
    noted = {"mapping_loss": 1} if "mapping_steps" in options else {"representation_distance": 2, "tamper_loss": 1}
    for key in ("representation_distance", "tamper_loss", "mapping_loss"):
        found = [t._metrics[key] for t in (halves, whole)]
        assert [len(values) for values in found] == ([noted[key], 1] if key in noted else [0, 0]), key
        assert key not in noted or sum(found[0]) / len(found[0]) == close(found[1][0], rel=1e-9)


def test_entropy_is_of_the_response_only():
    model, inputs = tiny_lora(), batch("safe")
    values, found = tar.on_responses(model, inputs, tar.negative_entropy)
    mask = inputs["labels"][:, 1:] != -100
    log_p = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits[:, :-1].log_softmax(-1)[mask]
    torch.testing.assert_close(values, (log_p.exp() * log_p).sum(-1))
    assert found.tolist() == mask.nonzero()[:, 0].tolist()
    assert -math.log(97) < values.min() and values.max() < 0
    changed = {**inputs, "input_ids": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 50)}
    torch.testing.assert_close(tar.on_responses(model, changed, tar.negative_entropy)[0], values)
    uniform = tar.negative_entropy(torch.zeros(1, 97), None).item()
    assert uniform == close(-math.log(97)) and tar.negative_entropy(1e4 * torch.eye(97)[:1], None).item() == 0


@pytest.mark.slow
def test_likelihood_is_chunked_without_a_difference(monkeypatch):
    model, answers = tiny_lora(), {"chosen": batch("safe"), "rejected": batch("harmful")}
    found = []
    for chunk in (64, 5):
        monkeypatch.setattr(tar, "MIN_CHUNK_ROWS", chunk)
        monkeypatch.setattr(tar, "CHUNK_ELEMENTS", 1)
        model.zero_grad()
        found.append(tar.margin(model, answers))
        found[-1].sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(found[0], found[2])
    torch.testing.assert_close(found[1], found[3], rtol=1e-9, atol=1e-12)
    by_hand = answer_likelihood(model, batch("safe")) - answer_likelihood(model, batch("harmful"))
    torch.testing.assert_close(found[0], by_hand)


def test_the_inner_attack_never_sees_what_is_held_out(make, monkeypatch):
    safety = load_safety("organism", "alignment")
    out = [held_out(row["prompt"]) for row in safety]
    assert 0.1 < sum(out) / len(out) < 0.3  # of alignment prompts, which are those with a small hash
    own = [p for p in (f"q {i}" for i in range(4000)) if split_of(p) == "alignment"]
    assert 0.17 < sum(map(held_out, own)) / len(own) < 0.23
    trainer = make()
    seen = []
    monkeypatch.setattr(trainer, "batch_loss", spy(trainer.batch_loss, seen))
    trainer.tamper_gradient()
    trained = {tuple(r) for b in seen for r in b["input_ids"][:, :11].tolist()}
    allowed = {tuple(r) for r in batch("harmful")["input_ids"][:, :11].tolist()}
    assert trained == allowed and len(seen) == 4


def spy(original, seen):
    return lambda model, inputs, items: seen.append(inputs) or original(model, inputs, items)


def test_no_dropout_in_the_attack_and_dropout_in_the_step(make):
    model = tiny_lora()
    for module in model.modules():
        if "lora_dropout" in getattr(module, "__dict__", {}).get("_modules", {}):
            module.lora_dropout["default"] = torch.nn.Dropout(0.5)
    trainer = make(model=model)
    modes = []
    trainer.blocks[0].mlp.up_proj.lora_dropout["default"].register_forward_hook(lambda m, *_: modes.append(m.training))
    torch.manual_seed(0)
    state = torch.get_rng_state()
    trainer.tamper_gradient()
    assert torch.equal(state, torch.get_rng_state()) and set(modes) == {False}
    modes.clear()
    step(trainer)
    assert modes == [False] * 7 + [True]  # 4 inner steps, 2 outcomes, where it started; then the step
    modes.clear()
    step(trainer)  # a second micro-batch
    assert modes == [False, True]


@pytest.mark.slow
def test_a_run_maps_first_and_knows_its_cost(tmp_path):
    options = {
        "max_steps": 6, "max_length": 64, "per_device_train_batch_size": 4, "mapping_steps": 0.25, "inner_steps": 2,
        "tamper_interval": 1, "save_strategy": "no",
    }  # fmt: skip
    data = AlignOptions(model="organism", safety_data="organism", task_data="organism", held_out_prompts=0)
    run = align(TARTrainer, "tar", data, TARConfig(str(tmp_path / "run"), **options))
    logged = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert ["mapping_loss" in line for line in logged] == [True] * 2 + [False] * 4
    # By hand, LoRA: 2 mapping steps of 2; 4 of 1 + 2 inner + 2 outcomes + half for the forward at the start.
    assert read_run(run)["compute"]["total"] == 2 * 2 + 4 * 5.5


def test_cost_in_sft_steps(make):
    """By hand: K inner steps and K / n outcomes, the step itself, and forwards at the start (of three parts of a step
    with full weights, of two with an adapter); a preference has two answers."""
    paper = {"inner_steps": 64, "tamper_interval": 4}
    assert make(**paper).step_cost() == 64 + 16 + 1 + 1 / 2
    assert make(model=tiny_llama(), full_weights=True, **paper).step_cost() == close(64 + 16 + 1 + 1 / 3)
    assert make(tamper_loss="preference").step_cost() == 4 + 2 * 2 + 1 + 1 / 2 + 2 / 2
    assert make(lambda_representation=0.0).step_cost() == 4 + 2 + 1
    assert make(mapping_steps=2).step_cost() == 2


def test_what_cannot_be_is_refused(make):
    for options, told in (
        ({"inner_steps": 0}, "inner_steps is 0; it must be at least 1"),
        ({"tamper_interval": 9, "inner_steps": 8}, "the tamper-resistance loss would never be taken"),
        ({"lambda_tr": -1.0}, "lambda_tr is -1.0"),
        ({"tamper_loss": "preferences"}, "did you mean 'preference'"),
        ({"inner_learning_rates": "1e-3,fast"}, "inner_learning_rates is '1e-3,fast'"),
        ({"mapping_steps": 8, "max_steps": 8}, "mapping_steps is 8, all of the 8 steps"),
    ):
        with pytest.raises(UsageError, match=told):
            TARConfig(output_dir="x", **options)
    with pytest.raises(UsageError, match="there are 4 rows for the inner attack"):
        make(per_device_train_batch_size=5)
    with pytest.raises(UsageError, match="`rejected` is missing, and tar needs it"):
        TARTrainer(
            tiny_lora(), TARConfig("x"), safety_data=[{"prompt": "p", "chosen": "c"}], processing_class=TinyTokenizer()
        )
    trainer = make()
    trainer.parameters[0].data.fill_(float("nan"))
    with pytest.raises(RunError, match="the tamper gradient is not finite at step 0"):
        step(trainer)
