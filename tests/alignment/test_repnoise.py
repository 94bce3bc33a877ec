"""RepNoise against reference numbers, in the released code's form and in ours."""

import math
import weakref

import pytest
import torch
from tiny import GOLDEN, GOLDEN_RTOL, TinyTokenizer, assert_gradients, encoded, gradients, rows, tiny_llama, tiny_lora
from torch.nn.functional import cross_entropy

import tunevax.alignment.repnoise as repnoise
import tunevax.alignment.sft as sft
from tunevax.alignment.repnoise import RepNoiseConfig, RepNoiseTrainer, Targets, mmd, mmd_to_noise
from tunevax.errors import UsageError
from tunevax.modeling.draws import noise_generator
from tunevax.modeling.loss import labelled

pytestmark = pytest.mark.numerical

close = pytest.approx
REFERENCE = GOLDEN["repnoise"]
DATA = [{"prompt": "p", "chosen": "c", "rejected": "r"}] * 4


@pytest.fixture
def make(monkeypatch, tmp_path):
    """A trainer on the golden pairs, already encoded, with the golden noise."""
    encoded(monkeypatch, c=rows("safe"), r=rows("harmful"))
    monkeypatch.setattr(repnoise, "noise_generator", lambda *_: torch.Generator().manual_seed(2024))

    def build(cls=RepNoiseTrainer, kind="lora", model=None, **options):
        model = model or (tiny_lora() if kind == "lora" else tiny_llama())
        options = {
            "output_dir": str(tmp_path),
            "per_device_train_batch_size": 4,
            "checkpoint_blocks": "none",
            "full_weights": kind == "base_full",
            **options,
        }
        trainer = cls(model, cls.config_class(**options), safety_data=DATA, processing_class=TinyTokenizer())
        trainer.state.global_step, trainer.current_gradient_accumulation_steps = 0, 1
        return trainer

    return build


def inputs_of(trainer, part=slice(None)):
    return trainer.data_collator(trainer.train_dataset[part])


def step(trainer, inputs=None, items=None):
    inputs = inputs or inputs_of(trainer)
    items = items or (inputs["labels"][:, 1:] != -100).sum()
    return trainer.training_step(trainer.model, inputs, items).item()


def as_reference(trainer, name):
    """Make the trainer compute the golden variant `name`: two of them are between the released form and ours."""
    inputs = inputs_of(trainer)
    if name in ("label_mask", "clean"):
        ids, other = inputs["input_ids"], inputs["rejected_input_ids"]
        differ = ids != other
        inputs["labels"] = ids.masked_fill(~differ | (inputs["attention_mask"] == 0), -100)
        inputs["rejected_labels"] = other.masked_fill(~differ | (inputs["rejected_attention_mask"] == 0), -100)
        if name == "label_mask":
            trainer.targets = lambda _: (Targets(inputs["labels"]), Targets(inputs["rejected_labels"]), differ)
    return inputs


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["base_full", "lora"])
@pytest.mark.parametrize("name", ["official", "label_mask", "clean", "response"])
def test_matches_reference(make, kind, name):
    expected, variant = REFERENCE[kind][name], "official" if name in ("official", "label_mask") else "corrected"
    trainer = make(kind=kind, variant=variant)
    inputs = as_reference(trainer, name)
    safe, harmful, mask = trainer.targets(inputs)
    found = trainer.forward(trainer.model, inputs)
    assert len(labelled(safe.labels)[0]) + safe.dead == expected["n_targets_safe"]
    assert len(labelled(harmful.labels)[0]) + harmful.dead == expected["n_targets_harmful"]
    retain = trainer.cross_entropy(trainer.model, [found.safe], safe)
    assert retain.item() == close(expected["ce_retain"], rel=GOLDEN_RTOL)
    last = trainer.norm(found.harmful) if variant == "official" else found.harmful
    states = [*(trainer.norm(s) for s in found.states), last]
    hidden = [trainer.cross_entropy(trainer.model, [s], harmful).item() for s in states]
    assert hidden == close(expected["ce_hidden"], rel=GOLDEN_RTOL)
    final = trainer.cross_entropy(trainer.model, [found.harmful], harmful).item()
    assert final == close(expected["ce_harmful_final"], rel=GOLDEN_RTOL)
    ascent = trainer.ascent(trainer.model, found, harmful)
    assert ascent.item() == close(expected["ascent_mean"], rel=GOLDEN_RTOL)
    generator = repnoise.noise_generator()
    per_layer = [mmd_to_noise(a, mask, generator, generator.get_state()).item() for a in found.activations]
    assert per_layer == close(expected["mmd_per_layer"], rel=GOLDEN_RTOL)
    distance = trainer.distance(found.activations, mask)
    assert distance.item() == close(expected["mmd_mean"], rel=GOLDEN_RTOL)
    assert {"ascent_log1p": ascent.log1p().item(), "ascent_log": ascent.log().item()} == close(
        {k: expected[k] for k in ("ascent_log1p", "ascent_log")}, rel=GOLDEN_RTOL
    )
    for key, value in (("retain", retain), ("mmd", distance), ("minus_log1p", -ascent.log1p())):
        grads = torch.autograd.grad(value, trainer.parameters, retain_graph=True, allow_unused=True)
        norm = math.sqrt(sum(g.square().sum().item() for g in grads if g is not None))
        assert norm == close(expected[f"gnorm_{key}"], rel=GOLDEN_RTOL), key


@pytest.mark.parametrize("kind", ["base_full", "lora"])
@pytest.mark.parametrize("name", ["official", "label_mask", "clean", "response"])
def test_step_matches_reference(make, kind, name):
    expected, variant = REFERENCE[kind][name], "official" if name in ("official", "label_mask") else "corrected"
    trainer = make(kind=kind, variant=variant)
    loss = step(trainer, as_reference(trainer, name))
    assert loss == close(expected["total_log1p" if variant == "official" else "total_log"], rel=GOLDEN_RTOL)
    # The reference's gradients are of log(1 + a). Those of log(a) are the same at alpha a / (1 + a).
    a = expected["ascent_mean"]
    trainer = make(kind=kind, variant=variant, alpha=1.0 if variant == "official" else a / (1 + a))
    step(trainer, as_reference(trainer, name))
    assert_gradients(gradients(trainer.model), expected["grads"], GOLDEN_RTOL)
    total = math.sqrt(sum(norm**2 for norm, _ in gradients(trainer.model).values()))
    assert total == close(expected["gnorm_total"], rel=GOLDEN_RTOL)
    trainer = make(kind=kind, variant=variant, alpha=0.0, beta=1.0)
    assert step(trainer, as_reference(trainer, name)) == close(expected["total_beta1_alpha0"], rel=GOLDEN_RTOL)
    assert_gradients(gradients(trainer.model), expected["grads_beta1_alpha0"], GOLDEN_RTOL)


@pytest.mark.slow
def test_alpha_and_beta_zero_is_sft(make):
    plain, noised = make(sft.SFTTrainer), make(alpha=0.0, beta=0.0)
    assert step(noised) == close(step(plain), rel=1e-9)
    assert_gradients(gradients(noised.model), gradients(plain.model), rtol=1e-9)


def brute_force(x, y):
    z = torch.cat([x, y])
    distance = (z[:, None] - z[None]).square().sum(-1)
    width = distance.sum() / (len(z) * (len(z) - 1)) / 4
    kernel = sum(torch.exp(-distance / (width * 2**q)) for q in range(5))
    n = len(x)
    return (kernel[:n, :n] + kernel[n:, n:] - kernel[:n, n:] - kernel[n:, :n]).mean()


@pytest.mark.parametrize("n", [1, 2, 5])
def test_mmd_is_the_direct_formula(n):
    generator = torch.Generator().manual_seed(n)
    x = (3 + torch.randn(n, 40, generator=generator, dtype=torch.float64)).requires_grad_()
    y = torch.randn(n, 40, generator=generator, dtype=torch.float64)
    assert mmd(x, y).item() == close(mmd(y, x).item(), rel=1e-9)
    assert mmd(x, y).item() == close(brute_force(x, y).item(), rel=1e-9)
    (grad,) = torch.autograd.grad(mmd(x, y), x)
    assert grad.isfinite().all() and (n == 1 or grad.abs().max() > 0)
    assert mmd(x, x).item() == close(0, abs=1e-12)


def test_mmd_keeps_no_pairwise_differences():
    """What a forward keeps is a few times the samples, and not [2n, 2n, features]."""
    x, y, kept = torch.randn(16, 1000, requires_grad=True), torch.randn(16, 1000), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        mmd(x, y)
    assert max(kept) == 32 * 1000


@pytest.mark.slow
def test_first_answer_token_has_a_gradient_and_prompt_and_pads_none(make):
    """The released code gives the first token none: there refusing and complying part."""
    at = {}
    for variant in ("corrected", "official"):
        trainer = make(variant=variant, beta=0.0)
        inputs, seen = inputs_of(trainer), {}
        forward = trainer.forward

        def look(*args, forward=forward, seen=seen):
            seen["pass"] = forward(*args)
            seen["pass"].safe.retain_grad(), seen["pass"].harmful.retain_grad()
            return seen["pass"]

        trainer.forward = look
        step(trainer, inputs)
        for key, prefix in (("safe", ""), ("harmful", "rejected_")):
            predicts = torch.zeros_like(inputs["labels"], dtype=torch.bool)
            predicts[:, :-1] = inputs[f"{prefix}labels"][:, 1:] != -100
            at[variant, key] = getattr(seen["pass"], key).grad.norm(dim=-1), predicts
    for key in ("safe", "harmful"):
        norms, predicts = at["corrected", key]
        assert (norms[predicts] > 0).all() and norms[~predicts].abs().max() == 0
        norms, predicts = at["official", key]
        first = predicts.int().argmax(1)
        assert norms[range(4), first].abs().max() == 0 and (norms[range(4), first + 1] > 0).all()


def test_each_depth_is_read_once(make):
    """The mean of L + 1 cross entropies, the last state normed once: against the plain computation."""
    trainer = make()
    inputs = inputs_of(trainer)
    found = trainer.forward(trainer.model, inputs)
    ascent = trainer.ascent(trainer.model, found, trainer.targets(inputs)[1])
    model = trainer.model.get_base_model()
    harmful = {k: inputs[f"rejected_{k}"] for k in ("input_ids", "attention_mask")}
    states = model(**harmful, output_hidden_states=True).hidden_states  # the last is normed
    logits = [model.lm_head(s if i == 8 else model.model.norm(s)) for i, s in enumerate(states)]
    labels = inputs["rejected_labels"][:, 1:].flatten()
    losses = [cross_entropy(x[:, :-1].flatten(0, 1), labels) for x in logits]
    assert len(losses) == 9 and ascent.item() == close(torch.stack(losses).mean().item(), rel=1e-9)


def test_heads_keep_no_logits(make):
    """What the graph of the ascent holds on to: head inputs at the labelled tokens, and no logits."""

    class Kept:
        def __init__(self, tensor):
            self.tensor = tensor
            alive.add(self)

    alive = weakref.WeakSet()
    trainer = make()
    inputs = inputs_of(trainer)
    found, targets = trainer.forward(trainer.model, inputs), trainer.targets(inputs)[1]
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        ascent = trainer.ascent(trainer.model, found, targets)
    rows = len(labelled(targets.labels)[0])
    shapes = [tuple(k.tensor.shape) for k in alive if k.tensor.is_floating_point() and not k.tensor.is_leaf]
    assert ascent.requires_grad and shapes == [(rows, 64)] * 7  # h_1 ... h_7; the embeddings need no gradient


@pytest.mark.slow
def test_gradients_accumulate(make):
    """Micro-batches add up: the retain loss to that of the batch, the rest to the mean of theirs."""
    whole, halves = make(alpha=0.0, beta=0.0), make(alpha=0.0, beta=0.0)
    items = (inputs_of(whole)["labels"][:, 1:] != -100).sum()
    loss = step(whole)
    halves.current_gradient_accumulation_steps = 2
    assert sum(step(halves, inputs_of(halves, p), items) for p in (slice(0, 1), slice(1, 4))) == close(loss, rel=1e-9)
    assert_gradients(gradients(halves.model), gradients(whole.model), rtol=1e-9)

    twice, once = make(beta=0.5), make(beta=0.5)
    twice.current_gradient_accumulation_steps, twice.whole = 2, torch.tensor([2 * len(inputs_of(once)["pairs"])])
    items = 2 * (inputs_of(once)["labels"][:, 1:] != -100).sum()
    assert step(twice, items=items) + step(twice, items=items) == close(step(once), rel=1e-9)
    assert_gradients(gradients(twice.model), gradients(once.model), rtol=1e-9)


@pytest.mark.slow
def test_a_micro_batch_without_a_pair_takes_no_weight_from_the_others(make):
    on, off = make(alpha=1.0, beta=0.0), make(alpha=0.0, beta=0.0)
    total = {on: 0.0, off: 0.0}
    for trainer in total:
        for i in (1, 3):
            del trainer.train_dataset[i]["rejected"]
        trainer.current_gradient_accumulation_steps, trainer.whole = 4, torch.tensor([2])
        items = (inputs_of(trainer)["labels"][:, 1:] != -100).sum()
        total[trainer] = sum(step(trainer, inputs_of(trainer, slice(i, i + 1)), items) for i in range(4))
    ascents = [math.log(a) for a in on._metrics["ascent"]]
    assert len(ascents) == 2 and total[off] - total[on] == close(sum(ascents) / 2, rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["elementwise", "all"])
def test_recomputation_changes_nothing(make, mode):
    kept, recomputed = make(beta=1.0), make(beta=1.0, checkpoint_blocks=mode)
    assert step(kept) == step(recomputed)
    assert_gradients(gradients(recomputed.model), gradients(kept.model), rtol=1e-9)
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in kept.model.modules())
    assert hooks == 0


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["corrected", "official"])
def test_benign_rows_enter_the_retain_loss_only(make, variant):
    """Two pairs and two rows without: the retain loss is over four rows, the rest is that of the two pairs."""
    mixed, two = make(variant=variant), make(variant=variant)
    for i in (1, 3):
        del mixed.train_dataset[i]["rejected"]
    inputs = inputs_of(mixed)
    assert inputs["pairs"].tolist() == [0, 2] and inputs["rejected_labels"].shape == inputs["labels"][:2].shape
    step(mixed), step(two, inputs_of(two, slice(0, 3, 2)))
    for key in ("ascent", "mmd"):
        assert mixed._metrics[key] == close(two._metrics[key], rel=1e-9)
    alone = make(variant=variant)
    for row in alone.train_dataset:
        del row["rejected"]
    loss = step(alone)  # a batch without a pair: plain SFT on all four rows
    assert loss == close(GOLDEN["sft"]["loss"], rel=GOLDEN_RTOL)
    assert_gradients(gradients(alone.model), GOLDEN["sft"]["grads"], GOLDEN_RTOL)


def test_safety_rows_are_paired_after_mixing(monkeypatch):
    def encode(data, *_, answer="completion", **__):
        return [{"input_ids": [1, 5, len(r[answer])], "labels": [-100, 5, len(r[answer])]} for r in data]

    monkeypatch.setattr("tunevax.modeling.method.encode", encode)
    safety = [{"prompt": "p", "chosen": "c" * n, "rejected": "r" * (20 + n)} for n in range(1, 13)]
    config = RepNoiseConfig("x", task_share=0.25)
    task = [{"prompt": "q", "completion": "t" * 40}]
    trainer = RepNoiseTrainer(tiny_lora(), config, safety_data=safety, task_data=task, processing_class=TinyTokenizer())
    found = [
        (row["input_ids"][2], row.get("rejected", {"input_ids": [0, 0, 0]})["input_ids"][2])
        for row in trainer.train_dataset
    ]
    assert sorted(found) == [(n, 20 + n) for n in range(1, 13)] + [(40, 0)] * 4


@pytest.mark.slow
def test_noise_is_new_each_time_and_resumes(make, tmp_path, monkeypatch):
    """A run of four steps, and the same run cut after two and continued: equal weights to the bit."""
    options = {
        "max_steps": 4, "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-2, "beta": 0.5, "save_total_limit": 4,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
    }  # fmt: skip
    trainers = [make(model=tiny_lora(), output_dir=str(tmp_path / n), **options) for n in "ab"]
    monkeypatch.setattr(repnoise, "noise_generator", noise_generator)
    straight, resumed = trainers
    first, second = (noise_generator(straight, number, "cpu").initial_seed() for number in range(2))
    assert first != second
    straight.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert resumed.drawn == straight.drawn == 8 and resumed.seen == straight.seen
    for a, b in zip(straight.parameters, resumed.parameters, strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_cost_counts_tokens_and_heads(make):
    """By hand: 8 blocks and 9 heads. A token through the body is its parameters, a label through the head 97 x 64."""
    trainer = make()
    step(trainer)
    inputs = inputs_of(trainer)
    body = sum(p.numel() for n, p in trainer.model.named_parameters() if ".layers." in n)
    safe, harmful = inputs["attention_mask"].sum().item(), inputs["rejected_attention_mask"].sum().item()
    expected = (body * (safe + harmful) + 97 * 64 * (46 + 9 * 52)) / (body * safe + 97 * 64 * 46)
    assert [(inputs[k] != -100).sum().item() for k in ("labels", "rejected_labels")] == [46, 52]
    assert trainer.cost() == close(expected)
    plain = make(alpha=0.0)
    step(plain)
    assert plain.cost() == close(1 + body * harmful / (body * safe + 97 * 64 * 46))


def test_bad_input_is_named(make):
    with pytest.raises(UsageError, match="did you mean 'official'"):
        RepNoiseConfig("x", variant="oficial")
    for options in ({"alpha": -1.0}, {"alpha": float("inf")}, {"beta": float("nan")}):
        with pytest.raises(UsageError, match=next(iter(options))):
            RepNoiseConfig("x", **options)
    for bad, what in (({"rejected": None}, "is missing"), ({"rejected": "c"}, "is `chosen` again")):
        with pytest.raises(UsageError, match=f"row 2 of the safety data: `rejected` {what}"):
            safety = [DATA[0], {**DATA[0], **bad}]
            RepNoiseTrainer(tiny_lora(), RepNoiseConfig("x"), safety_data=safety, processing_class=TinyTokenizer())
