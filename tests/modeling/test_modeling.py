"""Every supported architecture: blocks found, the response-only loss exact, the fast path equal to the plain one."""

import gc
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as t
from peft import LoraConfig, PeftModel, get_peft_model

from tunevax.alignment.t_vaccine import TVaccineTrainer
from tunevax.cli import main
from tunevax.modeling import load
from tunevax.modeling.blocks import find_blocks, find_final_norm
from tunevax.modeling.hooks import (
    CAST,
    Prefix,
    capture,
    capture_inputs,
    cheap_modules,
    cheap_recomputed,
    checkpointed,
    passed_through,
    perturb,
)
from tunevax.modeling.loss import last_hidden, logits_of, response_loss
from tunevax.modeling.memory import LiveMemory
from tunevax.organism import path

pytestmark = pytest.mark.numerical

SMALL = {
    "vocab_size": 80,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
LLAMA = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2}
ARCHITECTURES = {
    "llama": t.LlamaConfig(**LLAMA),
    "mistral": t.MistralConfig(**LLAMA, sliding_window=6),
    "qwen2": t.Qwen2Config(**LLAMA),
    "qwen3": t.Qwen3Config(**LLAMA, head_dim=8),
    "gemma2": t.Gemma2Config(
        **LLAMA, head_dim=8, final_logit_softcapping=2.0, query_pre_attn_scalar=8, sliding_window=6
    ),
    "gemma3": t.Gemma3TextConfig(**LLAMA, head_dim=8, query_pre_attn_scalar=8, sliding_window=6),
    "phi3": t.Phi3Config(**LLAMA, pad_token_id=0),
    "opt": t.OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32),
    "gpt_neox": t.GPTNeoXConfig(**SMALL, intermediate_size=48),
}


def build(name: str):
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(ARCHITECTURES[name])
    for parameter in model.parameters():  # zero or identity starts would hide mistakes
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def batch(left: bool = False) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 80, (3, 14), generator=torch.Generator().manual_seed(1))
    mask, labels = torch.ones_like(ids), ids.clone()
    for row, (prompt, length) in enumerate([(4, 14), (6, 9), (2, 12)]):
        labels[row, :prompt] = -100
        labels[row, length:] = -100
        mask[row, length:] = 0
    if left:  # the same rows, pushed to the right
        shifts = (14 - mask.sum(1)).tolist()
        ids, mask, labels = (
            torch.stack([r.roll(s) for r, s in zip(x, shifts, strict=True)]) for x in (ids, mask, labels)
        )
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_blocks_and_response_loss(name):
    model = build(name).eval()
    blocks = find_blocks(model)
    assert len(blocks) == 4 and blocks[0].o_proj in list(blocks[0].attention.modules())
    inputs = batch()
    stock = model(**inputs, use_cache=False)
    loss = response_loss(model, inputs)
    torch.testing.assert_close(loss, stock.loss, rtol=1e-5, atol=1e-6)
    grads = [torch.autograd.grad(x, list(model.parameters()), allow_unused=True) for x in (stock.loss, loss)]
    for expected, found in zip(*grads, strict=True):
        assert (expected is None) == (found is None)
        if expected is not None:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    hidden = last_hidden(model, {k: v for k, v in inputs.items() if k != "labels"})
    torch.testing.assert_close(logits_of(model, hidden), stock.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_states_between_the_blocks(name):
    """What enters each block, the norm that reads the last state, and a forward that ends with block 1."""
    model = build(name).eval()
    blocks = [b.module for b in find_blocks(model)]
    inputs = {k: v for k, v in batch().items() if k != "labels"}

    def hooks():
        return [(len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in m.__dict__) for m in model.modules()]

    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
        before = hooks()
        with capture_inputs(blocks) as entering, capture({3: blocks[3]}) as last:
            hidden = last_hidden(model, inputs)
        with passed_through(blocks[2:], blocks[1]), capture({1: blocks[1], 3: blocks[3]}) as found:
            last_hidden(model, inputs)
    assert all(torch.equal(entering[i], states[i]) for i in range(4))
    torch.testing.assert_close(find_final_norm(model)(last[3]), hidden)
    assert torch.equal(found[1], states[2]) and torch.equal(found[3], states[2])
    assert hooks() == before


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_replay_perturb_and_recompute_equal_the_plain_pass(name, left):
    model = build(name).eval()
    blocks = find_blocks(model)
    model.requires_grad_(False)
    trained = [p for b in blocks[2:] for p in b.module.parameters()]
    for parameter in trained:
        parameter.requires_grad_(True)
    inputs, site = batch(left), {2: blocks[2].attention, 3: blocks[3].attention}

    prefix = Prefix([b.module for b in blocks], 2)
    with prefix.record(), capture(site, leaf=2) as found:
        offsets = dict(zip(site, torch.autograd.grad(response_loss(model, inputs), [found[2], found[3]]), strict=True))
    assert offsets[2].shape == (3, 14, 32) and all(o.abs().max() > 0 for o in offsets.values())
    assert all(o[inputs["attention_mask"] == 0].abs().max() == 0 for o in offsets.values())

    def gradients(*contexts):
        from contextlib import ExitStack

        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context)
            loss = response_loss(model, inputs)
            loss.backward()
        grads = [p.grad.clone() for p in trained if p.grad is not None]
        model.zero_grad()
        return [loss.detach(), *grads]

    modules = [b.module for b in blocks]
    plain = gradients(perturb(site, offsets))
    calm = gradients()
    assert not torch.allclose(plain[0], calm[0], rtol=1e-4)
    for contexts in (
        (perturb(site, offsets), prefix.replay()),
        (perturb(site, offsets), checkpointed(modules)),
        (perturb(site, offsets), prefix.replay(), checkpointed(modules[2:])),
        (perturb(site, offsets), prefix.replay(), cheap_recomputed([m for b in modules[2:] for m in cheap_modules(b)])),
    ):
        for a, b in zip(plain, gradients(*contexts), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_cheap_recompute_is_not_fooled_by_views_or_changes_in_place():
    norm = torch.nn.RMSNorm(8)

    def first(x):
        a, b = norm(x).chunk(2, -1)
        return (a * b).sum()

    def second(x):
        n = norm(x)
        n.mul_(2)
        return (n * n).sum()

    for function in (first, second):
        x = torch.randn(3, 8, requires_grad=True)
        (plain,) = torch.autograd.grad(function(x), x)
        with cheap_recomputed([norm]):
            (found,) = torch.autograd.grad(function(x), x)
        torch.testing.assert_close(found, plain)


def kind_of(cheap) -> str:
    return "cast" if hasattr(cheap, CAST) else "norm" if type(cheap).__name__.endswith("Norm") else "activation"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_cheap_recompute_of_a_bf16_base_under_an_fp32_adapter(name):
    """The same bits. Norms, activation functions and the casts of the adapters' inputs each save memory of their own."""

    def run(skipped):
        base = build(name).bfloat16()
        model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        trained = [p for p in model.parameters() if p.requires_grad]
        generator = torch.Generator().manual_seed(2)
        for parameter in trained:  # B starts at zero
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        assert {p.dtype for p in trained} == {torch.float32}
        cheap = [m for b in find_blocks(model) for m in cheap_modules(b.module) if not skipped(m)]
        with cheap_recomputed(cheap), LiveMemory() as live:
            live.track(*model.parameters())
            weights = live.live
            response_loss(model, batch()).backward()
        return live.peak - weights, [p.grad for p in trained]

    least, gradients = run(lambda m: False)
    plain, expected = run(lambda m: True)
    assert least < 0.65 * plain
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))
    for kind in ("cast", "norm", "activation"):
        assert least < 0.95 * run(lambda m, kind=kind: kind_of(m) == kind)[0]


@pytest.mark.slow
def test_cheap_recompute_leaves_nothing_behind():
    """A result that is handed on but enters no loss, the soft-capped logits of Gemma 2, once held its own graph."""
    model = build("gemma2")
    blocks = find_blocks(model)
    cheap = [m for b in blocks for m in cheap_modules(b.module)]
    after = []
    with LiveMemory() as live:
        live.track(*model.parameters())
        for _ in range(2):
            with cheap_recomputed(cheap), capture({0: blocks[0].attention}, leaf=0) as found:
                torch.autograd.grad(response_loss(model, batch()), found[0])
            found.clear()
            gc.collect()
            after.append(live.live)
    assert after[0] == after[1]


def test_forward_set_on_an_instance_is_kept():
    model = build("llama")
    block = find_blocks(model)[0].module
    calls, original = [], block.forward

    def own(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    block.forward = own
    with checkpointed([block]):
        model(batch()["input_ids"])
    assert calls and block.forward is own


@pytest.mark.slow
def test_stock_peft_loads_what_tunevax_saves(tmp_path):
    out = tmp_path / "out"
    assert main(["align", "t-vaccine", "--model", "organism", "--safety-data", "organism", "--max-length", "64", "--gamma", "3",
                 "--max-steps", "3", "--warmup-steps", "0", "--output-dir", str(out)]) == 0  # fmt: skip
    base = t.AutoModelForCausalLM.from_pretrained(path())
    ids = torch.randint(5, 200, (2, 9))
    before = base(ids).logits
    stock = PeftModel.from_pretrained(base, out / "adapter").eval()(ids).logits
    assert not torch.allclose(before, stock)
    assert torch.equal(stock, load(str(out), merge=False).model(ids).logits)
    torch.testing.assert_close(stock, load(str(out)).model(ids).logits, rtol=1e-4, atol=1e-4)
    record = json.loads((out / "run.json").read_text())
    assert record["steps"] == 3 and record["model"]["hash"] and record["versions"]["torch"] == torch.__version__
    # A second hardening on top: adapters stack in order.
    top = tmp_path / "top"
    assert main(["align", "sft", "--model", str(out), "--safety-data", "organism", "--max-length", "64", "--max-steps", "2",
                 "--warmup-steps", "0", "--output-dir", str(top), "--learning-rate", "1e-2"]) == 0  # fmt: skip
    merged = PeftModel.from_pretrained(load(str(out)).model, top / "adapter").eval()(ids).logits
    assert torch.equal(merged, load(str(top), merge=False).model(ids).logits)
    with pytest.raises(Exception):  # noqa: B017, stock loading fails rather than put it on the wrong weights
        t.AutoModelForCausalLM.from_pretrained(top / "adapter")
    assert torch.allclose(load(str(top / "adapter"), merge=False).model(ids).logits, merged, atol=1e-5)
    assert not torch.allclose(merged, stock)


RESUMED = [
    "align", "t-vaccine", "--model", "organism", "--safety-data", "organism", "--task-data", "organism", "--max-length", "64",
    "--gamma", "3", "--sample-interval", "3", "--probe-interval", "7", "--lora-dropout", "0.1", "--max-steps", "12",
    "--save-steps", "5", "--per-device-train-batch-size", "4", "--gradient-accumulation-steps", "2",
]  # fmt: skip
KILLED = """
import os, signal, sys
from torch.optim.optimizer import register_optimizer_step_post_hook
from tunevax.cli import main

updates = []

def kill(*_):
    updates.append(1)
    if len(updates) == 11:
        os.kill(os.getpid(), signal.SIGKILL)

register_optimizer_step_post_hook(kill)
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_killed_and_resumed_gives_the_same_bits(tmp_path):
    """SIGKILL, from one process to the next; tests/contract interrupts every method within a process."""
    assert main([*RESUMED, "--output-dir", str(tmp_path / "whole")]) == 0
    target = tmp_path / "killed"
    command = [sys.executable, "-c", KILLED, *RESUMED, "--output-dir", str(target)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == -signal.SIGKILL, process.stderr[-3000:]
    checkpoints = tmp_path / "killed.partial" / "checkpoints"
    assert not target.exists() and any(checkpoints.glob("checkpoint-10"))
    assert main([*RESUMED, "--output-dir", str(target), "--resume"]) == 0
    adapters = [(tmp_path / n / "adapter" / "adapter_model.safetensors").read_bytes() for n in ("whole", "killed")]
    assert adapters[0] == adapters[1]
    logs = [
        [json.loads(line) for line in (tmp_path / n / "log.jsonl").read_text().splitlines()]
        for n in ("whole", "killed")
    ]
    assert logs[0] == logs[1] and [line["step"] for line in logs[0]] == list(range(1, 13))


def test_a_resumed_run_must_be_the_same_run(tmp_path, capsys):
    from tunevax.runs import writing

    with (
        pytest.raises(KeyboardInterrupt),
        writing(str(tmp_path / "out"), {"verb": "align", "method": "sft", "config": {"seed": 1}}) as run,
    ):
        (run.checkpoints / "checkpoint-3").mkdir()
        raise KeyboardInterrupt
    from tunevax.errors import UsageError

    with (
        pytest.raises(UsageError, match="started with seed=1, not 2"),
        writing(str(tmp_path / "out"), {"verb": "align", "method": "sft", "config": {"seed": 2}}, resume=True),
    ):
        pass
    assert (tmp_path / "out.partial" / "checkpoints" / "checkpoint-3").exists()


@pytest.mark.slow
def test_two_ranks_agree_with_one_process(tmp_path):
    """Two ranks with half the batch each: the same joint norm and update as one process with all of it."""
    script = Path(__file__).with_name("two_ranks.py")
    results = []
    for ranks in (1, 2):
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
        out = tmp_path / f"{ranks}.pt"
        done = subprocess.run(
            [sys.executable, *launch, str(script), str(out)], capture_output=True, text=True, timeout=300
        )
        assert out.exists(), done.stderr[-3000:]
        results.append(torch.load(out))
    one, two = results
    assert one["selected"] == two["selected"]
    assert one["norms"] == pytest.approx(two["norms"], rel=1e-4)
    assert one["weights"].keys() == two["weights"].keys()
    for name, weight in one["weights"].items():
        assert (weight - two["weights"][name]).norm() <= 1e-4 * weight.norm(), name


def test_unknown_lora_targets_are_named():
    from tunevax.errors import UsageError
    from tunevax.modeling.trainables import prepare_trainables
    from tunevax.modeling.trainer import TrainConfig

    with pytest.raises(UsageError, match="lora_targets 'nothing'"):
        prepare_trainables(build("llama"), TrainConfig("x", lora_targets="nothing"))


@pytest.mark.slow
def test_trainables_are_fp32_on_a_bf16_model():
    from tunevax.modeling.trainables import prepare_trainables
    from tunevax.modeling.trainer import TrainConfig

    model = prepare_trainables(build("llama").bfloat16(), TrainConfig("x"))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_lora_on_the_wrapped_model_is_found():
    model = get_peft_model(build("qwen3"), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    assert len(find_blocks(model)) == 4
    assert issubclass(TVaccineTrainer, t.Trainer)


@pytest.mark.parametrize("name", ["cohere", "granite"])
def test_scaled_logits(name):
    import transformers as t

    from tunevax.modeling.loss import response_loss

    small = dict(
        vocab_size=80,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    config = {
        "cohere": t.CohereConfig(**small, logit_scale=0.25),
        "granite": t.GraniteConfig(**small, logits_scaling=4.0),
    }[name]
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(config).eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    ids = torch.randint(3, 80, (3, 14))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    torch.testing.assert_close(response_loss(model, inputs), model(**inputs).loss, rtol=1e-5, atol=1e-6)


def test_full_weights_of_a_bf16_model_train_in_fp32():
    from tunevax.modeling.trainables import prepare_trainables
    from tunevax.modeling.trainer import TrainConfig

    model = prepare_trainables(build("llama").bfloat16(), TrainConfig("x", full_weights=True))
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_last_checkpoint_is_the_newest_whole_one(tmp_path):
    from tunevax.modeling.trainer import last_checkpoint

    assert last_checkpoint(tmp_path) is None
    for step_, text in ((5, "{}"), (95, "{}"), (100, "{}"), (105, '{"global_st'), (110, None)):
        folder = tmp_path / f"checkpoint-{step_}"
        folder.mkdir()
        if text is not None:
            (folder / "trainer_state.json").write_text(text)
    assert last_checkpoint(tmp_path).name == "checkpoint-100"


@pytest.mark.slow
def test_a_kept_base_is_the_base_again_and_follows_its_files(tmp_path):
    folder, kept = tmp_path / "base", {}
    tiny = load("organism")
    tiny.model.save_pretrained(folder)
    tiny.tokenizer.save_pretrained(folder)
    first = load(str(folder), kept=kept).model
    with torch.no_grad():
        first.model.embed_tokens.weight.zero_()  # an attack
    again = load(str(folder), kept=kept).model
    assert torch.equal(again.model.embed_tokens.weight, tiny.model.model.embed_tokens.weight)
    assert again.lm_head.weight is not kept[next(iter(kept))].lm_head.weight
    first.save_pretrained(folder)
    assert not load(str(folder), kept=kept).model.model.embed_tokens.weight.any()
    assert len(kept) == 1
