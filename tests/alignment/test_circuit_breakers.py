"""Circuit breakers against the formulas written out, and its reference against the model it started from."""

import pytest
import torch
from tiny import TinyTokenizer, assert_gradients, encoded, gradients, rows, tiny_llama
from torch.nn.functional import cosine_similarity

from tunevax.alignment.circuit_breakers import CircuitBreakersConfig, CircuitBreakersTrainer
from tunevax.errors import UsageError

pytestmark = pytest.mark.numerical

close = pytest.approx
DATA = [{"prompt": "p", "chosen": "c", "rejected": "r"}] * 4


@pytest.fixture
def make(monkeypatch, tmp_path):
    """A trainer on the golden pairs, already encoded; its adapter is fresh, or random with `moved`."""
    encoded(monkeypatch, c=rows("safe"), r=rows("harmful"))

    def build(model=None, moved=True, **options):
        options = {
            "output_dir": str(tmp_path),
            "per_device_train_batch_size": 4,
            "checkpoint_blocks": "none",
            "lora_r": 4,
            **options,
        }
        config = CircuitBreakersConfig(**options)
        trainer = CircuitBreakersTrainer(
            model or tiny_llama(), config, safety_data=DATA, processing_class=TinyTokenizer()
        )
        if moved:
            generator = torch.Generator().manual_seed(5)
            for p in trainer.parameters:
                p.data = (0.1 * torch.randn(p.shape, generator=generator)).to(p.dtype)
        trainer.state.global_step, trainer.state.max_steps, trainer.current_gradient_accumulation_steps = 0, 10, 1
        return trainer

    return build


def inputs_of(trainer, part=slice(None)):
    return trainer.data_collator(trainer.train_dataset[part])


def step(trainer, inputs=None):
    inputs = inputs or inputs_of(trainer)
    items = (inputs["labels"][:, 1:] != -100).sum()
    return trainer.training_step(trainer.model, inputs, items).item()


def by_hand(trainer, inputs, targets=(3, 5), answers="rejected_labels"):
    """L_cb and L_ret from two plain forwards: of the model, and of the one it was made from."""
    base = tiny_llama()

    def states(model, prefix):
        found = {k: inputs[prefix + k] for k in ("input_ids", "attention_mask")}
        return model(**found, output_hidden_states=True).hidden_states

    model = trainer.model
    harmful = list(zip(states(model, "rejected_"), states(base, "rejected_"), strict=True))
    safe = list(zip(states(model, ""), states(base, ""), strict=True))
    where = inputs[answers] != (-100 if answers == "rejected_labels" else 0)
    l_cb = torch.cat([cosine_similarity(*harmful[i], dim=-1)[where].relu() for i in targets]).mean()
    valid = inputs["attention_mask"] == 1
    l_ret = torch.cat([(a - b).square().sum(-1).sqrt()[valid] for a, b in safe[1 : max(targets) + 1]]).mean()
    return l_cb, l_ret


@pytest.mark.slow
def test_a_fresh_adapter_has_nothing_to_retain_and_all_to_reroute(make):
    trainer = make(moved=False, alpha=4.0)
    assert step(trainer) == close(4.0, rel=1e-9)
    assert trainer._metrics["retain"] == [0.0] and trainer._metrics["reroute"] == [close(1.0, rel=1e-9)]
    trainer.model.zero_grad()
    trainer.state.global_step = 5
    assert step(trainer) == close(3.0, rel=1e-9)
    assert all(p.grad is None or p.grad.isfinite().all() for p in trainer.parameters)


@pytest.mark.parametrize("reroute_on", ["response", "all"])
@pytest.mark.parametrize("number", [0, 4, 10, 30])
def test_loss_and_gradients_are_the_formulas(make, number, reroute_on):
    trainer = make(alpha=2.0, reroute_on=reroute_on)
    trainer.state.global_step = number
    answers = "rejected_labels" if reroute_on == "response" else "rejected_attention_mask"
    l_cb, l_ret = by_hand(trainer, inputs_of(trainer), answers=answers)
    assert 0.05 < l_cb < 0.999 and l_ret > 0.1
    c_r = 2.0 * min(number, 10) / 20
    assert trainer.coefficients() == close((2.0 - c_r, c_r))
    expected = (2.0 - c_r) * l_cb + c_r * l_ret
    expected.backward()
    grads = gradients(trainer.model)
    trainer.model.zero_grad()
    assert step(trainer) == close(expected.item(), rel=1e-9)
    assert_gradients(gradients(trainer.model), grads)
    assert trainer._metrics["reroute"] == [close(l_cb.item(), rel=1e-9)]
    assert trainer._metrics["retain"] == [close(l_ret.item(), rel=1e-9)]
    assert all(f"layers.{i}." not in name for name in grads for i in (5, 6, 7))  # nothing above the deepest target


@pytest.mark.slow
def test_targets_are_relative_depths(make):
    assert CircuitBreakersConfig("x").depths() == [0.3125, 0.625]
    assert make().targets == [3, 5]
    assert make(tiny_llama(28)).targets == [9, 18]
    assert make(target_depths="1.0, 0.125").targets == [1, 8]


@pytest.mark.slow
def test_the_deepest_target_can_be_the_last_block(make):
    trainer = make(target_depths="1")
    trainer.state.global_step = 10
    # h_8 before the final norm, which the stock model's own list of states does not have.
    last = []
    handle = trainer.blocks[7].module.register_forward_hook(lambda *a: last.append(a[2]))
    loss = step(trainer)
    handle.remove()
    (reference, states) = last
    where = inputs_of(trainer)["rejected_labels"] != -100
    l_cb = cosine_similarity(states[4:], reference[4:], dim=-1)[where].relu().mean()
    assert trainer._metrics["reroute"] == [close(l_cb.item(), rel=1e-9)] and loss > 0
    assert any("layers.7." in name for name in gradients(trainer.model))


@pytest.mark.slow
def test_the_reference_is_the_model_that_was_given(make):
    """An aligned model: other weights than any base, merged, dropout in it. The reference sees it without dropout."""
    aligned = tiny_llama()
    for p in aligned.parameters():
        p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3))
    aligned.config.attention_dropout = 0.5
    for block in aligned.model.layers:
        block.self_attn.attention_dropout = 0.5
    inputs = None
    trainer = make(aligned)
    inputs = inputs_of(trainer)
    with torch.no_grad(), trainer.model.disable_adapter():
        ids = {k: inputs[k] for k in ("input_ids", "attention_mask")}
        expected = trainer.model.eval()(**ids, output_hidden_states=True).hidden_states
    seen, states = [], trainer.states
    trainer.states = lambda model, batch: seen.append((model.training, states(model, batch))) or seen[-1][1]
    step(trainer)
    (reference_mode, reference), (mode, _) = seen
    assert (reference_mode, mode) == (False, True)
    torch.testing.assert_close(reference[4][:4], expected[5])
    assert not reference[0].requires_grad
    assert all(p.requires_grad for p in trainer.parameters)


@pytest.mark.slow
def test_micro_batches_add_up(make):
    """Means are over the tokens of the whole batch: unequal micro-batches give its loss and gradients."""
    whole, parts = make(alpha=2.0), make(alpha=2.0)
    for trainer in (whole, parts):
        trainer.state.global_step = 4
    loss = step(whole)
    batches = [inputs_of(parts, slice(0, 1)), inputs_of(parts, slice(1, 4))]
    batches, items = parts.get_batch_samples(iter(batches), 2, torch.device("cpu"))
    parts.current_gradient_accumulation_steps = 2
    assert sum(parts.training_step(parts.model, b, items).item() for b in batches) == close(loss, rel=1e-9)
    assert_gradients(gradients(parts.model), gradients(whole.model))
    for key in ("retain", "reroute"):
        assert sum(parts._metrics[key]) / 2 == close(whole._metrics[key][0], rel=1e-9)


@pytest.mark.slow
def test_benign_rows_are_retained_and_not_rerouted(make):
    mixed, pair = make(alpha=2.0), make(alpha=2.0)
    for trainer in (mixed, pair):
        trainer.state.global_step = 4
    for i in (1, 2, 3):
        del mixed.train_dataset[i]["rejected"]
    step(mixed), step(pair, inputs_of(pair, slice(0, 1)))
    assert mixed._metrics["reroute"] == [close(pair._metrics["reroute"][0], rel=1e-9)]
    _, l_ret = by_hand(mixed, inputs_of(make()))
    assert mixed._metrics["retain"] == [close(l_ret.item(), rel=1e-9)]
    alone = make()
    for row in alone.train_dataset:
        del row["rejected"]
    alone.state.global_step = 4
    assert step(alone) == close(10.0 * 0.2 * l_ret.item(), rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["elementwise", "all"])
def test_recomputation_changes_nothing_and_hooks_are_gone(make, mode):
    kept, recomputed = make(), make(checkpoint_blocks=mode)
    for trainer in (kept, recomputed):
        trainer.state.global_step = 4
    assert step(kept) == step(recomputed)
    assert_gradients(gradients(recomputed.model), gradients(kept.model), rtol=1e-9)
    modules = list(recomputed.model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in modules)


@pytest.mark.slow
def test_the_schedule_counts_optimiser_steps(make, tmp_path):
    """Two micro-batches a step: the coefficients go from alpha and 0 to near alpha / 2 each."""
    options = {"max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "moved": False}
    trainer = make(output_dir=str(tmp_path), **options)
    used, coefficients = [], trainer.coefficients
    trainer.coefficients = lambda: used.append(coefficients()) or used[-1]
    trainer.log_extra = dict
    trainer.train()
    assert used == [close((10 - c, c)) for c in (0, 1.25, 2.5, 3.75) for _ in range(2)]


@pytest.mark.slow
def test_cost_is_two_forwards_and_a_backward_up_to_the_deepest_target(make):
    trainer, ran = make(), []
    for i, block in enumerate(trainer.blocks):
        block.mlp.register_forward_hook(lambda *_, i=i: ran.append(i))
    step(trainer)
    assert sorted(ran) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    inputs = inputs_of(trainer)
    safe, harmful = inputs["attention_mask"].sum().item(), inputs["rejected_attention_mask"].sum().item()
    assert trainer.cost() == close((3 * 5 / 8 * (safe + harmful)) / (2 * safe))


@pytest.mark.slow
def test_bad_input_is_named(make):
    with pytest.raises(UsageError, match="circuit-breakers .* full_weights"):
        CircuitBreakersConfig("x", full_weights=True)
    for depths in ("0", "1.5", "10,20", "a", "", "0.3,-0.1"):
        with pytest.raises(UsageError, match="target_depths"):
            CircuitBreakersConfig("x", target_depths=depths)
    with pytest.raises(UsageError, match="names the embeddings"):
        make(target_depths="0.05")
    for alpha in (0.0, -1.0, float("nan")):
        with pytest.raises(UsageError, match="alpha"):
            CircuitBreakersConfig("x", alpha=alpha)
    with pytest.raises(UsageError, match="unknown reroute_on 'prompt'"):
        CircuitBreakersConfig("x", reroute_on="prompt")
    with pytest.raises(UsageError, match="circuit-breakers .* comes with an adapter; merge"):
        make(make().model)
