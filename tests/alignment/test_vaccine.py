"""Vaccine and T-Vaccine against reference numbers, and each shortcut against the plain form."""

import re
from types import SimpleNamespace

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

import tunevax.alignment.sft as sft
import tunevax.alignment.vaccine as vaccine
from tunevax.alignment.t_vaccine import TVaccineConfig, TVaccineTrainer
from tunevax.alignment.vaccine import VaccineConfig, VaccineTrainer
from tunevax.errors import RunError, UsageError
from tunevax.modeling.hooks import Prefix

pytestmark = pytest.mark.numerical

close = pytest.approx


@pytest.fixture
def make(monkeypatch, tmp_path):
    """A trainer on the golden batch, already encoded."""
    encoded(monkeypatch, c=rows("safe"), r=rows("harmful"))

    def build(cls, layers=8, attn="eager", model=None, **options):
        options = {
            "output_dir": str(tmp_path),
            "per_device_train_batch_size": 4,
            "checkpoint_blocks": "none",
            **options,
        }
        data = [{"prompt": "p", "chosen": "c", "rejected": "r"}]
        trainer = cls(
            model or tiny_lora(layers, attn),
            cls.config_class(**options),
            safety_data=data,
            processing_class=TinyTokenizer(),
        )
        trainer.state.global_step, trainer.current_gradient_accumulation_steps = 0, 1
        return trainer

    return build


def step(trainer, data="safe"):
    inputs = batch(data)
    items = (inputs["labels"][:, 1:] != -100).sum()
    loss = trainer.training_step(trainer.model, inputs, items).item()
    return loss, trainer._metrics


def test_sft_matches_reference(make):
    trainer = make(sft.SFTTrainer)
    loss, _ = step(trainer)
    assert loss == close(GOLDEN["sft"]["loss"], rel=GOLDEN_RTOL)
    assert_gradients(gradients(trainer.model), GOLDEN["sft"]["grads"], GOLDEN_RTOL)


@pytest.mark.slow
def test_vaccine_matches_reference(make):
    expected = GOLDEN["vaccine"]
    trainer = make(VaccineTrainer, rho=2.0)
    loss, metrics = step(trainer)
    assert metrics["pass1_loss"][-1] == close(expected["pass1_loss"], rel=GOLDEN_RTOL)
    assert metrics["embedding_grad_norm"][-1] == close(expected["joint_grad_norm"], rel=GOLDEN_RTOL)
    assert loss == close(expected["pass2_loss"], rel=GOLDEN_RTOL)
    assert_gradients(gradients(trainer.model), expected["grads"], GOLDEN_RTOL)


@pytest.mark.parametrize("layers", [8, 28])
@pytest.mark.parametrize("scope", ["block", "attention"])
def test_t_vaccine_matches_reference(make, layers, scope):
    expected = GOLDEN["tvaccine"] if layers == 8 else GOLDEN["tvaccine"]["deep28"]
    active = GOLDEN["tvaccine"]["active"] if layers == 8 else expected["active"]
    trainer = make(
        TVaccineTrainer, layers=layers, rho=3.0, layer_sampling=",".join(map(str, active)), train_scope=scope
    )
    loss, metrics = step(trainer)
    assert metrics["pass1_loss"][-1] == close(expected["pass1_loss"], rel=GOLDEN_RTOL)
    assert metrics["embedding_grad_norm"][-1] == close(expected["joint_grad_norm"], rel=GOLDEN_RTOL)
    assert loss == close(expected["pass2_loss"], rel=GOLDEN_RTOL)
    table = expected["grads_paper" if scope == "block" else "grads_official"]
    found = gradients(trainer.model)
    assert_gradients(found, table, GOLDEN_RTOL)
    total = expected.get("total_norm_paper" if scope == "block" else "total_norm_official")
    assert total is None or np.sqrt(sum(norm**2 for norm, _ in found.values())) == close(total, rel=GOLDEN_RTOL)
    assert loss != close(expected["pass1_loss"], rel=1e-2)  # that of an unperturbed model
    with pytest.raises(AssertionError):
        assert_gradients(found, expected["grads_official" if scope == "block" else "grads_paper"], GOLDEN_RTOL)
    if layers == 8:  # so that these mistakes cannot pass
        mistakes = {
            k: v for k, v in GOLDEN["wrong_implementations_must_differ"].items() if re.match("tvaccine.*pass2", k)
        }
        assert len(mistakes) == 5
        for name, value in mistakes.items():
            assert loss != close(value, rel=1e-2), name


def test_perturbation_norms_match_reference(make):
    deep = GOLDEN["tvaccine"]["deep28"]
    for cls, expected, options in (
        (VaccineTrainer, GOLDEN["vaccine"], {"rho": 2.0}),
        (TVaccineTrainer, GOLDEN["tvaccine"], {"rho": 3.0, "layer_sampling": "1,4,6"}),
        (TVaccineTrainer, deep, {"rho": 3.0, "layer_sampling": "3,11,20", "layers": 28}),
    ):
        trainer = make(cls, **options)
        if cls is TVaccineTrainer:
            trainer.select()
        prefix = Prefix([b.module for b in trainer.blocks], trainer.first_block())
        _, offsets = trainer.perturbation(trainer.model, batch("safe"), None, prefix)
        assert {str(i): o.norm().item() for i, o in offsets.items()} == close(expected["eps_norm"], rel=GOLDEN_RTOL)
        padded = batch("safe")["attention_mask"] == 0
        assert all(o[padded].abs().max() == 0 for o in offsets.values())


@pytest.mark.slow
def test_probe_and_draws_match_reference(make):
    expected = GOLDEN["tvaccine"]
    trainer = make(TVaccineTrainer, gamma=3, seed=43)
    trainer.scores = trainer.probe(batch("harmful"))
    assert trainer.scores == close(expected["probe_batch4"]["scores"], rel=GOLDEN_RTOL)
    assert trainer.probabilities().tolist() == close(expected["probe_batch4"]["probabilities"], rel=GOLDEN_RTOL)
    row = {k: torch.tensor([v]) for k, v in rows("harmful")[0].items()}
    row["attention_mask"] = torch.ones_like(row["input_ids"])
    trainer.scores = trainer.probe(row)
    assert trainer.scores == close(expected["probe_row0"]["scores"], rel=GOLDEN_RTOL)
    assert trainer.probabilities().tolist() == close(expected["probe_row0"]["probabilities"], rel=GOLDEN_RTOL)
    assert all(p.grad is None for p in trainer.model.parameters())
    deep = make(TVaccineTrainer, layers=28, gamma=3)
    with torch.no_grad():  # which of the two batches the reference probed, its loss tells
        losses = [deep.batch_loss(deep.model, b, None).item() for b in (row, batch("harmful"))]
    probed = expected["deep28"]["probe"]
    (used,) = [
        b
        for b, loss in zip((row, batch("harmful")), losses, strict=True)
        if loss == close(probed["loss"], rel=GOLDEN_RTOL)
    ]
    deep.scores = deep.probe(used)
    assert deep.scores == close(probed["scores"], rel=GOLDEN_RTOL)
    assert deep.probabilities().tolist() == close(probed["probabilities"], rel=GOLDEN_RTOL)


@pytest.mark.slow
def test_named_generator_gives_the_official_draws(make):
    trainer = make(TVaccineTrainer, gamma=3, seed=43)
    trainer.scores = GOLDEN["tvaccine"]["probe_batch4"]["scores"]
    draws = [trainer.draw() for _ in range(3)]
    reference = np.random.RandomState(43)
    p = trainer.probabilities()
    assert draws == [sorted(reference.choice(8, 3, replace=False, p=p).tolist()) for _ in range(3)]
    assert draws == GOLDEN["tvaccine"]["np_seed43_draws"]


@pytest.mark.slow
@pytest.mark.parametrize("perturbation", ["gradient", "random"])
@pytest.mark.parametrize("cls", [VaccineTrainer, TVaccineTrainer])
def test_rho_zero_is_sft(make, cls, perturbation):
    plain = make(sft.SFTTrainer)
    robust = make(cls, rho=0.0, perturbation=perturbation, **({"gamma": 8} if cls is TVaccineTrainer else {}))
    assert step(plain)[0] == step(robust)[0]
    for (name, a), (_, b) in zip(plain.model.named_parameters(), robust.model.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or torch.equal(a.grad, b.grad), name


def test_rho_zero_is_sft_for_embeddings_too(make):
    models = [tiny_llama(), tiny_llama()]
    for model in models:
        model.lm_head.weight = model.model.embed_tokens.weight
    plain = make(sft.SFTTrainer, model=models[0], full_weights=True)
    robust = make(VaccineTrainer, model=models[1], full_weights=True, rho=0.0)
    assert step(plain)[0] == step(robust)[0]
    for (name, a), (_, b) in zip(plain.model.named_parameters(), robust.model.named_parameters(), strict=True):
        assert a.grad is not None and torch.equal(a.grad, b.grad), name


@pytest.mark.slow
def test_draws_survive_blocks_without_gradient(make):
    trainer = make(TVaccineTrainer, gamma=5)
    trainer.scores = [0.0, 1.0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0]
    assert len(trainer.draw()) == 5 and {1, 3} <= set(trainer.draw())


@pytest.mark.slow
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("mode", ["elementwise", "0.5", "frozen", "all"])
def test_recomputation_changes_nothing(make, mode, attn):
    options = {"rho": 3.0, "layer_sampling": "2,5", "attn": attn}
    kept, recomputed = make(TVaccineTrainer, **options), make(TVaccineTrainer, checkpoint_blocks=mode, **options)
    assert step(kept)[0] == step(recomputed)[0]
    for a, b in zip(kept.model.parameters(), recomputed.model.parameters(), strict=True):
        assert a.grad is None and b.grad is None or torch.equal(a.grad, b.grad)


@pytest.mark.slow
@pytest.mark.parametrize("shortcut", ["replay", "response_only"])
def test_fast_path_is_the_plain_path(make, shortcut):
    options = {"rho": 3.0, "layer_sampling": "2,5"}
    fast, plain = make(TVaccineTrainer, **options), make(TVaccineTrainer, **options)
    setattr(plain, shortcut, False)
    # The stock loss is taken in fp32, whose exponents and sums are off by 2^-24 each: 16 of them make 1e-6.
    rtol = 1e-9 if shortcut == "replay" else 1e-6
    assert step(fast)[0] == close(step(plain)[0], rel=rtol)
    expected = gradients(plain.model)
    assert_gradients(gradients(fast.model), expected, rtol)


@pytest.mark.slow
def test_gradients_accumulate(make):
    trainer = make(TVaccineTrainer, rho=3.0, layer_sampling="2,5")
    step(trainer)
    once = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    step(trainer)
    for name, parameter in trainer.model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, 2 * once[name])


@pytest.mark.slow
def test_hooks_are_gone_after_an_exception(make, monkeypatch):
    trainer = make(TVaccineTrainer, rho=3.0, layer_sampling="2,5", checkpoint_blocks="frozen")

    def count():
        return sum(
            len(m._forward_hooks) + len(m._forward_pre_hooks) + ("forward" in m.__dict__)
            for m in trainer.model.modules()
        )

    before = count()
    step(trainer)
    assert count() == before
    for failing in ("perturbation", "compute_loss"):
        with monkeypatch.context() as patch:
            calls, original = [], getattr(trainer, failing)

            def fail(*args, original=original, calls=calls, **kwargs):
                calls.append(1)
                original(*args, **kwargs)
                raise RuntimeError("boom")

            patch.setattr(trainer, failing, fail)
            with pytest.raises(RuntimeError, match="boom"):
                step(trainer)
        assert calls and count() == before
        assert any(p.requires_grad for p in trainer.model.parameters())


@pytest.mark.slow
def test_perturbation_removed_before_backward_would_be_noticed(make, monkeypatch):
    """The trap: with recomputation, hooks that leave before backward give wrong gradients without an error."""
    options = {"rho": 3.0, "layer_sampling": "2,5", "checkpoint_blocks": "all"}
    right, wrong = make(TVaccineTrainer, **options), make(TVaccineTrainer, **options)
    original = wrong.accelerator.backward

    def backward(loss, **kwargs):
        for block in wrong.blocks:
            block.attention._forward_hooks.clear()
        original(loss, **kwargs)

    monkeypatch.setattr(wrong.accelerator, "backward", backward)
    step(right), step(wrong)
    with pytest.raises(AssertionError):
        assert_gradients(gradients(wrong.model), gradients(right.model), rtol=1e-9)


def in_float64(trainer):
    """Its weights in float64, and those of adapters away from their start, the same for every trainer."""
    trainer.model.double()
    generator = torch.Generator().manual_seed(5)
    for name, p in trainer.model.named_parameters():
        if "lora_" in name:
            p.data = 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return trainer


def grads_of(trainer):
    return {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}


def assert_same(found, expected, rtol=1e-9):
    assert set(found) == set(expected), sorted(set(found) ^ set(expected))
    for name, grad in expected.items():
        assert (found[name] - grad).norm() <= rtol * grad.norm(), name


def outside(names):
    return {
        part for n in names if ".layers." not in n for part in ("embed_tokens", "model.norm", "lm_head") if part in n
    }


WHOLE = {"untied": {"full_weights": True}, "tied": {"full_weights": True}}
ADAPTERS = {
    "head": {"lora_targets": "q_proj,up_proj,lm_head"},
    "embeddings": {"lora_targets": "q_proj,embed_tokens"},
    "blocks": {"lora_targets": "q_proj,up_proj"},
}
OUTSIDE = {
    "untied": {"embed_tokens", "model.norm", "lm_head"}, "tied": {"embed_tokens", "model.norm"},
    "head": {"lm_head"}, "embeddings": {"embed_tokens"}, "blocks": set(),
}  # fmt: skip


def model_for(kind):
    model = tiny_llama()
    if kind == "tied":
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


@pytest.mark.slow
@pytest.mark.parametrize("kind", OUTSIDE)
def test_all_blocks_selected_is_vaccine_in_every_parameter(make, kind):
    options = {**(WHOLE | ADAPTERS)[kind], "rho": 3.0}
    whole = in_float64(make(VaccineTrainer, model=model_for(kind), **options))
    targeted = in_float64(make(TVaccineTrainer, model=model_for(kind), gamma=8, **options))
    for trainer in (whole, targeted):
        step(trainer), step(trainer)  # two micro-batches, the second on top of the first
    assert_same(grads_of(targeted), grads_of(whole))
    assert {n for n, _ in targeted.model.named_parameters() if grads_of(targeted).get(n) is not None} == {
        n for n, p in whole.model.named_parameters() if p.requires_grad
    }
    assert outside(grads_of(targeted)) == OUTSIDE[kind]


@pytest.mark.slow
@pytest.mark.parametrize("perturbation", ["gradient", "random"])
@pytest.mark.parametrize("kind", OUTSIDE)
def test_outside_the_blocks_all_trains_whatever_is_selected(make, monkeypatch, kind, perturbation):
    """Gradients of the loss with the same eps on blocks 2 and 5, in one graph, by hand."""
    options = {**(WHOLE | ADAPTERS)[kind], "rho": 3.0, "layer_sampling": "2,5", "perturbation": perturbation}
    trainer = in_float64(make(TVaccineTrainer, model=model_for(kind), **options))
    ran, kept = [], {}
    trainer.blocks[1].mlp.register_forward_hook(lambda *_: ran.append(torch.is_grad_enabled()))
    perturb = vaccine.perturb
    monkeypatch.setattr(vaccine, "perturb", lambda modules, eps: kept.update(eps) or perturb(modules, eps))
    step(trainer)
    found = {n: g.clone() for n, g in grads_of(trainer).items()}
    assert outside(found) == OUTSIDE[kind]
    below = kind in ("untied", "tied", "embeddings")
    assert ran == ([True] if perturbation == "random" else [True, True] if below else [False])

    trainer.model.zero_grad()
    for i, eps in kept.items():
        trainer.blocks[i].attention.register_forward_hook(lambda _m, _a, out, eps=eps: (out[0] + eps, *out[1:]))
    inputs = batch("safe")
    trainer.batch_loss(trainer.model, inputs, (inputs["labels"][:, 1:] != -100).sum()).backward()
    assert_same(found, grads_of(trainer))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["elementwise", "0.5", "frozen", "all"])
def test_recomputation_reaches_the_embeddings(make, mode):
    options = {"rho": 3.0, "layer_sampling": "2,5", "full_weights": True}
    kept = make(TVaccineTrainer, model=tiny_llama(), **options)
    again = make(TVaccineTrainer, model=tiny_llama(), checkpoint_blocks=mode, **options)
    ran = []
    again.blocks[0].mlp.up_proj.register_forward_hook(lambda *_: ran.append(1))
    assert step(kept)[0] == step(again)[0]
    assert_same(grads_of(again), grads_of(kept), 0.0)
    assert len(ran) == (2 if mode == "elementwise" else 3)  # block 0 is frozen: two passes, and again for backward


def post_norm(kind):
    import transformers as t

    config = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
              "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-30,
              "pad_token_id": 2, "attn_implementation": "eager"}  # fmt: skip
    more = {} if kind == "olmo2" else {"head_dim": 8, "query_pre_attn_scalar": 8}
    config = t.AutoConfig.for_model(kind, **config, **more)
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(config)
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text", "olmo2", "llama"])
def test_what_a_block_adds_has_no_arbitrary_scale(make, kind):
    """A post-norm block with its attention's output scaled is the same block: no logit changes, and no p_l may."""

    def probe(embedding, scale):
        model = tiny_llama() if kind == "llama" else post_norm(kind)
        trainer = make(TVaccineTrainer, model=model, gamma=2, embedding=embedding, lora_targets="q_proj")
        trainer.model.double()
        with torch.no_grad():
            trainer.blocks[2].o_proj.weight *= scale
            logits = trainer.model(**batch("harmful")).logits
        trainer.scores = trainer.probe(batch("harmful"))
        return logits, trainer.probabilities(), [type(m).__name__ for m in trainer.embedded]

    (logits, p, modules), (same, scaled, _) = probe("added", 1.0), probe("added", 0.1)
    paper, far = probe("attention", 1.0)[1], probe("attention", 0.1)[1]
    if kind == "llama":
        assert p.tolist() == paper.tolist() and all("Attention" in m for m in modules)
        return
    # transformers' norms round to fp32 in any model: 2^-24 at each of the 17 or more, of which no more than 1e-5 is left.
    torch.testing.assert_close(logits, same, rtol=1e-5, atol=1e-5)
    assert all("Norm" in m for m in modules) and scaled == close(p, rel=1e-5)
    assert abs(far - paper).max() > 0.1


@pytest.mark.parametrize("cls", [VaccineTrainer, TVaccineTrainer])
def test_the_perturbation_goes_where_e_l_is(make, monkeypatch, cls):
    options = {"rho": 3.0, "embedding": "added", "lora_targets": "q_proj"}
    trainer = make(cls, model=post_norm("olmo2"), **options, **({"gamma": 4} if cls is TVaccineTrainer else {}))
    seen, kept, perturb = [], {}, vaccine.perturb
    monkeypatch.setattr(vaccine, "perturb", lambda modules, eps: kept.update(eps) or perturb(modules, eps))
    # OLMo 2's MLP reads the residual stream as the attention left it; block 0 has the same input in both passes.
    trainer.blocks[0].mlp.register_forward_pre_hook(lambda _m, args: seen.append(args[0].detach()))
    in_float64(trainer)
    loss, metrics = step(trainer)
    assert trainer.embedded == [b.module.post_attention_layernorm for b in trainer.blocks]
    assert loss > metrics["pass1_loss"][-1]
    torch.testing.assert_close(seen[-1] - seen[-2], kept[0].double(), rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_frozen_blocks_do_not_train_and_state_follows(make):
    for mode in ("keep", "offload", "drop"):
        trainer = make(TVaccineTrainer, model=tiny_llama(), full_weights=True, gamma=2, inactive_state=mode, rho=1.0)
        trainer.create_optimizer()
        seen = set()
        for number in range(4):
            trainer.state.global_step = number
            before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
            step(trainer)
            trainer.optimizer.step()
            trainer.optimizer.zero_grad()
            moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
            assert {int(n.split(".")[2]) for n in moved if n.startswith("model.layers.")} == set(trainer.selected)
            assert outside(moved) == {"embed_tokens", "model.norm", "lm_head"}
            seen |= set(trainer.selected)
        with_state = {i for i, ps in enumerate(trainer.trainable) if any(p in trainer.optimizer.state for p in ps)}
        assert with_state == (set(trainer.selected) if mode == "drop" else seen)


@pytest.mark.slow
def test_dropout_is_off_in_frozen_blocks_only(make):
    model = tiny_lora()
    for module in model.modules():
        if "lora_dropout" in getattr(module, "__dict__", {}).get("_modules", {}):
            module.lora_dropout["default"] = torch.nn.Dropout(0.5)
    trainer = make(TVaccineTrainer, model=model, rho=1.0, layer_sampling="2,5")
    seen: dict[int, set] = {}
    for i, block in enumerate(trainer.blocks):
        dropout = block.mlp.up_proj.lora_dropout["default"]
        dropout.register_forward_hook(lambda m, *_, i=i: seen.setdefault(i, set()).add(m.training))
    step(trainer)
    assert seen == {i: {i in (2, 5)} for i in range(8)}


@pytest.mark.slow
def test_per_token_budget(make):
    tokens = int(batch("safe")["attention_mask"].sum())
    total = make(TVaccineTrainer, rho=3.0, layer_sampling="2,5")
    scaled = make(TVaccineTrainer, rho=3.0, layer_sampling="2,5", rho_scale="per-token", rho_reference_tokens=tokens)
    assert step(total)[0] == close(step(scaled)[0], rel=1e-9)
    quarter = make(
        TVaccineTrainer, rho=6.0, layer_sampling="2,5", rho_scale="per-token", rho_reference_tokens=4 * tokens
    )
    assert step(total)[0] == close(step(quarter)[0], rel=1e-9)


def test_a_random_perturbation_has_the_size_of_the_gradients(make, monkeypatch):
    trainer = make(TVaccineTrainer, rho=3.0, layer_sampling="2,5", perturbation="random")
    trainer.select()
    inputs = batch("safe")
    first, second = trainer.random_perturbation(inputs), trainer.random_perturbation(inputs)
    assert (
        sorted(first) == [2, 5] and not torch.allclose(first[2], first[5]) and not torch.allclose(first[2], second[2])
    )
    padded = inputs["attention_mask"] == 0
    assert padded.any() and all(o[padded].abs().max() == 0 for o in first.values())
    assert torch.cat([o.flatten() for o in first.values()]).norm().item() == close(
        3.0, rel=1e-6
    )  # noise in fp32, summed pairwise: 14 * 2^-24
    # A second rank with the same share: rho is the norm of both together, and the other rank has noise of its own.
    monkeypatch.setattr(trainer.accelerator, "reduce", lambda value, _: 2 * value)
    monkeypatch.setattr(TVaccineConfig, "process_index", 1)
    trainer.perturbed = 0
    other = trainer.random_perturbation(inputs)
    assert torch.cat([o.flatten() for o in other.values()]).norm().item() == close(3.0 / 2**0.5, rel=1e-6)
    assert not torch.allclose(other[2] * 2**0.5, first[2])


@pytest.mark.slow
@pytest.mark.parametrize("cls", [VaccineTrainer, TVaccineTrainer])
def test_a_random_perturbation_is_added_in_one_pass(make, cls):
    options = {"rho": 3.0, **({"layer_sampling": "2,5"} if cls is TVaccineTrainer else {})}
    found = {}
    for kind in ("none", "gradient", "random"):
        trainer = make(cls, **{**options, **({"rho": 0.0} if kind == "none" else {"perturbation": kind})})
        calls = []
        trainer.blocks[7].module.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        found[kind] = (step(trainer)[0], len(calls), gradients(trainer.model))
    assert [found[k][1] for k in ("gradient", "random")] == [2, 1]
    assert len({round(loss, 4) for loss, *_ in found.values()}) == 3
    assert set(found["random"][2]) == set(found["gradient"][2])  # the same weights train
    # A random direction does less harm than the worst one, of course.
    assert abs(found["random"][0] - found["none"][0]) < found["gradient"][0] - found["none"][0]


@pytest.mark.slow
def test_cost_in_sft_steps(make):
    """By hand, 8 blocks: SFT 2F; Vaccine 4F; T-Vaccine F + 3(1 - m/8)F; with a random direction F + (1 - m/8)F.
    Full weights: SFT 3F, and the weight gradients of what trains on top."""

    def cost(cls, **options):
        trainer = make(cls, **options)
        if cls is TVaccineTrainer:
            trainer.select(), trainer.select()  # two micro-batches
            trainer.state.global_step = 1
        return trainer.cost()

    full = {"full_weights": True}
    assert cost(sft.SFTTrainer) == 1
    assert cost(VaccineTrainer) == 2 and cost(VaccineTrainer, perturbation="random") == 1
    assert cost(VaccineTrainer, model=tiny_llama(), **full) == close(5 / 3)
    assert cost(TVaccineTrainer, layer_sampling="2,5") == close((1 + 3 * 6 / 8) / 2)
    assert cost(TVaccineTrainer, layer_sampling="2,5", perturbation="random") == close((1 + 6 / 8) / 2)
    head = {"model": tiny_llama(), "lora_targets": "q_proj,lm_head"}
    assert cost(TVaccineTrainer, layer_sampling="2,5", **head) == close((1 + 3 * 6 / 8) / 2)
    # Where embeddings train, pass 2 goes through all blocks and back.
    below = {"model": tiny_llama(), "lora_targets": "q_proj,embed_tokens"}
    assert cost(TVaccineTrainer, layer_sampling="2,5", **below) == close((1 + 6 / 8 + 2) / 2)
    below["model"] = tiny_llama()
    assert cost(TVaccineTrainer, layer_sampling="2,5", perturbation="random", **below) == close((1 + 1) / 2)
    full["model"] = tiny_llama()
    assert cost(TVaccineTrainer, layer_sampling="2,5", **full) == close((1 + 6 / 8 + 2 + 2 / 8) / 3)


@pytest.mark.slow
def test_cost_is_the_mean_over_draws_with_the_probes(make):
    trainer = make(
        TVaccineTrainer,
        gamma=3,
        probe_interval=2,
        probe_size=3,
        gradient_accumulation_steps=2,
        layer_sampling="inverse",
    )
    lowest = []
    for number in range(4):
        trainer.state.global_step = number
        trainer.select()
        lowest.append(min(trainer.selected))
    trainer.state.global_step = 4
    assert len(set(lowest)) > 1
    probes = 2 * 3 / (4 * 2)  # two of them, 3 rows each where a step has 8
    assert trainer.cost() == close((sum((1 + 3 * (1 - m / 8)) / 2 for m in lowest) + probes) / 4)


@pytest.mark.slow
def test_config_rejects_what_cannot_be(make):
    with pytest.raises(UsageError, match="did you mean 'random'"):
        VaccineConfig(output_dir="x", perturbation="randon")
    for options in ({"rho": -1.0}, {"rho": float("nan")}, {"rho": float("inf")}):
        with pytest.raises(UsageError, match="rho"):
            VaccineConfig(output_dir="x", **options)
    with pytest.raises(UsageError, match="did you mean 'uniform'"):
        TVaccineConfig(output_dir="x", layer_sampling="unifrom")
    with pytest.raises(UsageError, match="gamma is 9; the model has 8 blocks"):
        make(TVaccineTrainer, gamma=9)
    with pytest.raises(UsageError, match="names block 8"):
        make(TVaccineTrainer, layer_sampling="2,8")


@pytest.mark.slow
def test_probes_and_draws_come_when_they_should(make, monkeypatch):
    trainer = make(TVaccineTrainer, gamma=3, probe_interval=4, sample_interval=3, probe_size=3)
    probed, drawn, draw = [], [], trainer.draw
    monkeypatch.setattr(
        trainer, "probe", lambda b: probed.append((trainer.state.global_step, len(b["input_ids"]))) or [1.0] * 8
    )
    monkeypatch.setattr(trainer, "draw", lambda: drawn.append(trainer.state.global_step) or draw())
    for number in range(9):
        trainer.state.global_step = number
        trainer.select(), trainer.select()  # two micro-batches
    assert probed == [(0, 3), (4, 3), (8, 3)] and drawn == [0, 3, 6]


@pytest.mark.slow
def test_scores_are_a_moving_average(make, monkeypatch):
    trainer = make(TVaccineTrainer, gamma=3, probe_interval=1, probe_ema=0.75)
    answers = iter([[8.0] * 8, [4.0] * 8])
    monkeypatch.setattr(trainer, "probe", lambda _: next(answers))
    trainer.select()
    assert trainer.scores == [8.0] * 8
    trainer.state.global_step = 1
    trainer.select()
    assert trainer.scores == [7.0] * 8


@pytest.mark.slow
def test_kinds_of_sampling(make, monkeypatch):
    scores = [1.0, 2.0, 4.0, 9.0, 1.0, 1.0, 1.0, 1.0]
    by = {
        k: make(TVaccineTrainer, gamma=2, layer_sampling=k) for k in ("top", "inverse", "uniform", "harmful-gradient")
    }
    for trainer in by.values():
        trainer.scores = scores
    assert by["top"].draw() == [2, 3]
    assert by["uniform"].probabilities().tolist() == [1 / 8] * 8
    assert by["harmful-gradient"].probabilities()[3] == close(9 / 20)
    p = by["inverse"].probabilities()
    assert p[0] / p[3] == close(9) and p.sum() == close(1)


@pytest.mark.slow
def test_rejected_is_probed_and_chosen_is_trained(make):
    trainer = make(TVaccineTrainer, gamma=3)
    assert (trainer.harmful, trainer.train_dataset) == (rows("harmful"), rows("safe"))


@pytest.mark.slow
def test_a_probe_that_is_not_finite_stops_the_run(make):
    trainer = make(TVaccineTrainer, gamma=3)
    trainer.blocks[0].o_proj.base_layer.weight.data.fill_(float("nan"))
    with pytest.raises(RunError, match="harmful gradient is not finite at step 0"):
        trainer.probe(batch("harmful"))


@pytest.mark.slow
def test_the_probe_has_no_dropout_and_leaves_no_hook(make):
    model = tiny_lora()
    for module in model.modules():
        if "lora_dropout" in getattr(module, "__dict__", {}).get("_modules", {}):
            module.lora_dropout["default"] = torch.nn.Dropout(0.5)
    trainer = make(TVaccineTrainer, model=model, gamma=3)
    trainer.model.train()
    first = trainer.probe(batch("harmful"))
    trainer.model.train()
    assert trainer.probe(batch("harmful")) == first
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in trainer.model.modules())


@pytest.mark.slow
def test_sharpness_and_loss_are_those_of_the_whole_batch(make):
    whole, halves = make(VaccineTrainer, rho=2.0), make(VaccineTrainer, rho=2.0)
    loss, found = step(whole)
    assert found["sharpness"] == [close(loss - found["pass1_loss"][0], rel=1e-9)] and found["sharpness"][0] > 0
    halves.current_gradient_accumulation_steps = 2
    inputs = batch("safe")
    items = (inputs["labels"][:, 1:] != -100).sum()
    for part in (slice(0, 1), slice(1, 4)):
        halves.training_step(halves.model, {k: v[part] for k, v in inputs.items()}, items)
    assert np.mean(halves._metrics["pass1_loss"]) == close(found["pass1_loss"][0], rel=1e-9)


@pytest.mark.slow
def test_offloaded_state_leaves_and_comes_back(make):
    trainer = make(TVaccineTrainer, gamma=3, inactive_state="offload")
    inside, outside = (torch.nn.Parameter(torch.empty(2, device="meta"), requires_grad=r) for r in (True, False))
    trainer.trainable = [[inside], [outside]]
    trainer.optimizer = SimpleNamespace(state={p: {"exp_avg": torch.zeros(2)} for p in (inside, outside)})
    trainer.move_state(set())
    assert [trainer.optimizer.state[p]["exp_avg"].device.type for p in (inside, outside)] == ["meta", "cpu"]


def test_task_share_is_the_share_of_benign_rows(monkeypatch):
    seen = []
    monkeypatch.setattr("tunevax.modeling.method.encode", lambda *arguments: seen.append(arguments) or rows("safe"))
    safety = [{"prompt": "p", "chosen": f"c{i}"} for i in range(15)]
    config = sft.SFTConfig("x", task_share=0.25, loss_on="all")
    task = [{"prompt": "q", "completion": "t"}]
    sft.SFTTrainer(tiny_lora(), config, safety_data=safety, task_data=task, processing_class=TinyTokenizer())
    ((data, _, _, loss_on, _),) = seen
    assert sorted(r["completion"] for r in data if r["completion"] != "t") == sorted(r["chosen"] for r in safety)
    assert len(data) == 20 and loss_on == "all"


def test_an_infinite_loss_stops_the_run(make, monkeypatch):
    trainer = make(sft.SFTTrainer)
    monkeypatch.setattr(
        trainer, "compute_loss", lambda *_, **__: sum(p.sum() for p in trainer.parameters) * 0 + float("inf")
    )
    with pytest.raises(RunError, match="the loss became inf at step 1; there was no checkpoint"):
        step(trainer)
