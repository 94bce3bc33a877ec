"""Packed bases against their own weights decoded, under every method that trains an adapter, and in every place where
packed weights could be moved, merged or mistaken for plain ones."""

import math
import sys
import weakref

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import TinyTokenizer, batch, encoded, rows
from transformers import GPT2Config, GPT2LMHeadModel

from tunevax.alignment.align import AlignOptions, align
from tunevax.alignment.t_vaccine import TVaccineConfig, TVaccineTrainer
from tunevax.audit.controls import make_controls
from tunevax.cli import main
from tunevax.data.safety import load_safety
from tunevax.data.tasks import load_task
from tunevax.errors import UsageError
from tunevax.methods import load_method
from tunevax.modeling.biases import attach_biases
from tunevax.modeling.blocks import find_blocks
from tunevax.modeling.hooks import Prefix
from tunevax.modeling.loading import load
from tunevax.modeling.quantization import require_quantization, scales_of, size_of
from tunevax.records import read_run

bnb = pytest.importorskip("bitsandbytes")
from tunevax.modeling.packing import quantize  # noqa: E402

pytestmark = pytest.mark.numerical

KINDS = ("nf4", "int8")
SAFETY = load_safety("organism", "alignment", ("chosen", "rejected"))[:24]
TASK = load_task("organism:set=benign").rows[:8]
SHORT = {
    "max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "warmup_steps": 0, "max_length": 64,
    "save_strategy": "no", "report_to": "none",
}  # fmt: skip


def tiny_llama(layers=8):
    """In fp32: bitsandbytes packs nothing wider."""
    return tiny.tiny_llama(layers, dtype=torch.float32)


def packed(kind, layers=8):
    model = tiny_llama(layers)
    quantize(model, kind)
    return model


def decoded(layer):
    """The weight that a packed layer stands for, by bitsandbytes' own decoder or the definition of int8."""
    if isinstance(layer, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    scales = layer.state.SCB if layer.state.SCB is not None else layer.weight.SCB
    return layer.weight.data.float() * scales[:, None] / 127


def plain(model):
    """A stock model with the decoded weights of a packed one."""
    twin = tiny_llama(len(find_blocks(model)))
    for name, module in model.named_modules():
        if isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)):
            twin.get_submodule(name).weight.data = decoded(module)
    return twin


def adapted(model):
    """With an adapter on every linear layer that is away from its start."""
    model = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def off(found, expected):
    """The joint norm of the differences, as a share of that of what is expected."""
    difference = sum((a - b).double().square().sum() for a, b in zip(found, expected, strict=True))
    return math.sqrt(difference / sum(b.double().square().sum() for b in expected))


def test_packed_weights_are_near_what_they_were():
    stock, four, eight = (find_blocks(m)[0].o_proj for m in (tiny_llama(1), packed("nf4", 1), packed("int8", 1)))
    weight = stock.weight.detach()
    assert off([decoded(four)], [weight]) == pytest.approx(0.09, abs=0.02)  # of NF4 on Gaussian weights
    scale = (decoded(four) * weight).sum() / weight.square().sum()
    assert scale == pytest.approx(1, abs=0.01)
    assert four.quant_state.nested and four.quant_state.quant_type == "nf4" and four.quant_state.blocksize == 64
    half = weight.half().float()  # bitsandbytes goes by fp16
    assert ((decoded(eight) - half).abs() / (half.abs().amax(1, keepdim=True) / 127)).max() < 0.501
    half = tiny_llama(1).bfloat16()
    quantize(half, "nf4")
    layer = find_blocks(half)[0].o_proj
    assert layer.compute_dtype == decoded(layer).dtype == torch.bfloat16


@pytest.fixture
def t_vaccine_step(monkeypatch, tmp_path):
    """The perturbations and the adapter's gradient of one T-Vaccine step on blocks 2 and 5, on the golden batch."""
    encoded(monkeypatch, c=rows("safe"), r=rows("harmful"))

    def run(model, mode="none"):
        config = TVaccineConfig(str(tmp_path), rho=3.0, layer_sampling="2,5", checkpoint_blocks=mode)
        data = [{"prompt": "p", "chosen": "c", "rejected": "r"}]
        trainer = TVaccineTrainer(adapted(model), config, safety_data=data, processing_class=TinyTokenizer())
        trainer.state.global_step, trainer.current_gradient_accumulation_steps = 0, 1
        inputs = batch("safe")
        items = (inputs["labels"][:, 1:] != -100).sum()
        trainer.select()
        prefix = Prefix([b.module for b in trainer.blocks], trainer.first_block())
        _, offsets = trainer.perturbation(trainer.model, inputs, items, prefix)
        trainer.training_step(trainer.model, inputs, items)
        gradients = [p.grad for p in trainer.parameters if p.grad is not None]
        assert len(gradients) == 2 * 7 * 2  # of two blocks, seven layers each
        return [offsets[2], offsets[5]], gradients

    return run


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_on_packed_weights_is_the_step_on_their_values(t_vaccine_step, kind):
    """To rounding of the arithmetic, recomputed or not: on the CPU int8 rounds weights only."""
    model = packed(kind)
    perturbed, gradients = t_vaccine_step(plain(model))
    for mode in ("none", "frozen"):
        found = t_vaccine_step(model if mode == "frozen" else packed(kind), mode)
        assert off(found[0], perturbed) < 1e-5 and off(found[1], gradients) < 1e-5
    assert off(t_vaccine_step(tiny_llama())[1], gradients) > 0.01  # packing is not nothing


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """int8 products with the inputs rounded too; bitsandbytes has them on the CPU for inference only."""

    def product(x, weight, out=None, state=None, threshold=0.0, bias=None):
        return bnb.autograd._functions.MatMul8bitLt.apply(x, weight, out, bias, state)

    monkeypatch.setattr(bnb, "matmul", product)
    # A GPU adds in 32 bits. oneDNN's kernels for processors without VNNI add pairs in 16, which overflow.
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: a.int() @ b.int())


def rounded(x):
    """LLM.int8()'s: 127 steps to the largest of a row, features that reach 6 somewhere exact; straight through."""
    half = x.detach().half().float().flatten(0, -2)
    outliers = half.abs() >= 6
    largest = half.masked_fill(outliers, 0).abs().amax(1, keepdim=True)
    steps = torch.where(outliers.any(0), half, (half * 127 / largest).round() * largest / 127)
    return x + (steps.view_as(x) - x).detach()


def test_an_int8_product_of_a_gpu(as_on_a_gpu):
    layer = find_blocks(packed("int8", 1))[0].o_proj
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0))
    x[1, 2, 7], x[0, 0, 9] = 40.0, -8.0
    x.requires_grad_()
    y = layer(x)
    expected = rounded(x) @ decoded(layer).T
    assert off([y], [expected]) < 1e-4 < 1e-3 < off([y], [x @ decoded(layer).T])
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    (found,), (wanted,) = (torch.autograd.grad((o * weight).sum(), x) for o in (y, expected))
    assert off([found], [wanted]) < 1e-5


@pytest.mark.slow
def test_an_int8_step_of_a_gpu(t_vaccine_step, request):
    """Its distance from weights that are rounded alone is that of the rounding written out, no more. The two do not
    round alike: a difference in the last digit grows to a step of the grid within a few layers."""
    model = packed("int8")
    weights_only = t_vaccine_step(plain(model))
    twin = plain(model)
    for module in (m for b in find_blocks(twin) for m in b.module.modules() if isinstance(m, torch.nn.Linear)):
        module.register_forward_pre_hook(lambda _, args: (rounded(args[0]),))
    by_hand = t_vaccine_step(twin)
    request.getfixturevalue("as_on_a_gpu")
    for found, wanted, exact in zip(t_vaccine_step(model), by_hand, weights_only, strict=True):
        assert off(found, exact) == pytest.approx(off(wanted, exact), rel=0.1) and off(found, exact) < 0.1


def test_an_int8_layer_keeps_no_input_and_rounds_alike_in_both_modes():
    layer = find_blocks(packed("int8", 1))[0].o_proj
    x = torch.randn(2, 3, 64, requires_grad=True)
    source = x * 1
    gone, y = weakref.ref(source), layer(source)
    del source
    assert gone() is None
    y.sum().backward()
    torch.testing.assert_close(x.grad, decoded(layer).sum(0).expand_as(x))
    assert torch.equal(layer.train()(x), layer.eval()(x))


def test_a_forward_in_eval_mode_leaves_the_weights_as_they_are(monkeypatch):
    """Where the CPU has bf16 products, bitsandbytes would repack them for a kernel without gradients."""
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)
    layer = find_blocks(packed("nf4", 1))[0].o_proj
    x, before = torch.randn(2, 3, 64), layer.weight.data.clone()
    with torch.no_grad():
        layer.eval()(x)
    assert torch.equal(layer.weight.data, before)
    assert layer.train()(x.requires_grad_()).requires_grad


def test_int8_scales_move_with_the_weights():
    """As to a GPU, before a forward and after one; copies stand for it here. The stock layer leaves them behind."""
    layer = find_blocks(packed("int8", 1))[0].o_proj
    x = torch.randn(2, 3, 64)
    expected = decoded(layer)
    for _ in range(2):
        before = layer.weight.data_ptr(), layer.state.SCB.data_ptr()
        layer._apply(lambda t: t.clone())
        assert layer.state.CB.data_ptr() == layer.weight.data_ptr() != before[0]
        assert layer.state.SCB.data_ptr() != before[1] and layer.state.SCB.dtype == torch.float32
        torch.testing.assert_close(layer(x), x @ expected.T)
        assert layer.state.CB.data_ptr() == layer.weight.data_ptr() != before[0]
    layer.to(torch.bfloat16)
    assert layer.state.SCB.dtype == torch.float32 and layer.weight.dtype == torch.int8


@pytest.mark.parametrize("kind", KINDS)
def test_weights_can_be_packed_elsewhere_than_they_are(kind):
    model = tiny_llama(2)
    quantize(model, kind, "meta")  # for a GPU
    places = {n.split(".")[-2][-4:]: p.device.type for n, p in model.named_parameters()}
    assert places == {"kens": "cpu", "proj": "meta", "norm": "cpu", "head": "cpu"}
    assert {t.device.type for t in scales_of(model)} == {"meta"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_without_content_packs_to_the_same_sizes_and_trains(kind, monkeypatch):
    monkeypatch.delitem(bnb.functional.name2qmap, "dynamic", raising=False)  # as in a fresh process
    with torch.device("meta"):
        empty = tiny_llama_on_meta()
    quantize(empty, kind)
    real = packed(kind, 2)  # after the empty one: what they share must have content

    def sizes(model):
        return [(t.shape, t.dtype) for t in (*model.parameters(), *scales_of(model))]

    assert sizes(empty) == sizes(real) and real(**batch("safe")).loss.isfinite()
    assert sum(map(size_of, real.parameters())) == tiny_llama(2).num_parameters()
    linears = sum(p.numel() for b in find_blocks(tiny_llama(2)) for p in b.module.parameters() if p.dim() > 1)
    tensors = [p for b in find_blocks(real) for p in b.module.parameters() if not p.is_floating_point()]
    assert sum(t.nbytes for t in tensors) * 8 / linears == (4 if kind == "nf4" else 8)
    model = get_peft_model(empty, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    model(input_ids=torch.zeros(2, 5, dtype=torch.long, device="meta")).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def tiny_llama_on_meta():
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM(tiny_llama(2).config)


def test_a_lock_on_the_base_stays():
    for kind in KINDS:
        model, locked = tiny_llama(2), tiny_llama(2)
        attach_biases(locked, {1: torch.ones(64)})
        quantize(model, kind), quantize(locked, kind)
        block = find_blocks(locked)[1]
        x = torch.randn(1, 3, 64)
        torch.testing.assert_close(block.o_proj(x), find_blocks(model)[1].o_proj(x) + 1)


METHODS = [
    *(("alignment", m, {}) for m in ("sft", "vaccine", "repnoise", "circuit-breakers")),
    ("alignment", "booster", {"rho": 1.0}),
    ("alignment", "t-vaccine", {"gamma": 2, "probe_size": 2}),
    ("alignment", "tar", {"inner_steps": 2, "tamper_interval": 1, "mapping_steps": 1}),
    *(("finetuning", m, {}) for m in ("sft", "surgery", "ldifs", "safe-instruct")),
    ("finetuning", "lisa", {"k1": 1, "k2": 1}),
]


CASES = [(*m, kind) for m in METHODS for kind in KINDS if kind == "nf4" or m[0] == "alignment"]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "name", "options", "kind"), CASES, ids=[f"{s}-{n}-{k}" for s, n, _, k in CASES])
def test_every_method_trains_on_a_packed_base(stage, name, options, kind, tmp_path):
    cls = load_method(f"tunevax.{stage}", name)
    loaded = load("organism", quantization=kind)
    config = cls.config_class(str(tmp_path), **{**SHORT, **options})
    task = TASK if "task" in cls.needs else None
    trainer = cls(loaded.model, config, safety_data=SAFETY, task_data=task, processing_class=loaded.tokenizer)
    kinds = {type(m.o_proj).__module__ for m in trainer.blocks}
    assert kinds == {"peft.tuners.lora.bnb"}  # PEFT's own layers for packed weights
    packed_before = [p.clone() for p in trainer.model.parameters() if not p.is_floating_point()]
    before = [p.detach().clone() for p in trainer.parameters]
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    assert all(p.isfinite().all() for p in trainer.parameters)
    assert any(not torch.equal(p, b) for p, b in zip(trainer.parameters, before, strict=True))
    after = [p for p in trainer.model.parameters() if not p.is_floating_point()]
    assert after and all(torch.equal(a, b) for a, b in zip(after, packed_before, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_changes_nothing_for_circuit_breakers(kind, tmp_path):
    """The reference runs in eval mode without the adapter, the other pass in training mode with it."""
    cls = load_method("tunevax.alignment", "circuit-breakers")
    loaded = load("organism", quantization=kind)
    config = cls.config_class(str(tmp_path), **SHORT)
    trainer = cls(loaded.model, config, safety_data=SAFETY, processing_class=loaded.tokenizer)
    trainer.train()
    assert trainer.state.log_history[0]["retain"] < 1e-4


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A T-Vaccine run on the packed organism, with an adapter that weighs something."""
    out = tmp_path_factory.mktemp("runs") / "hardened"
    options = {**SHORT, "max_steps": 1, "learning_rate": 0.05}
    config = TVaccineConfig(str(out), gamma=4, probe_size=2, **options)
    return align(
        TVaccineTrainer,
        "t-vaccine",
        AlignOptions(model="organism", safety_data="organism", quantization="nf4", dtype="float32"),
        config,
    )


@pytest.mark.slow
def test_a_run_says_what_it_was_trained_on_and_loads_in_full_precision(run):
    record = read_run(run)
    assert record["config"]["quantization"] == record["model"]["quantization"] == "nf4"
    stock = load("organism")
    assert record["model"]["parameters"] == stock.info["parameters"] and stock.info["quantization"] is None
    loaded = load(str(run))
    assert loaded.info["quantization"] is None and not scales_of(loaded.model)
    expected = PeftModel.from_pretrained(stock.model, str(run / "adapter")).merge_and_unload()
    for a, b in zip(loaded.model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_a_chain_is_merged_first_and_packed_then(run, kind, tmp_path):
    """And not merged into packed weights, which would round the base once more and what was added along with it."""
    chained = load(str(run), quantization=kind).model
    merged = load(str(run)).model
    plain_weights = [b.o_proj.weight.detach().clone() for b in find_blocks(merged)]
    quantize(merged, kind)
    for a, b in zip(find_blocks(chained), find_blocks(merged), strict=True):
        assert torch.equal(decoded(a.o_proj), decoded(b.o_proj))
    base = load("organism", quantization=kind).model
    twice = PeftModel.from_pretrained(base, str(run / "adapter")).merge_and_unload()
    errors = [
        sum((decoded(b.o_proj) - w).norm() for b, w in zip(find_blocks(m), plain_weights, strict=True))
        for m in (chained, twice)
    ]
    assert errors[0] < 0.9 * errors[1]
    x, layer = torch.randn(2, 3, plain_weights[0].shape[1]), find_blocks(twice)[1].o_proj
    expected = x @ decoded(layer).T
    torch.testing.assert_close(layer(x), expected)  # worse, but not broken
    # Its last adapter kept apart: on a base that is packed without it.
    apart = load(str(run), quantization=kind, merge=False, trainable=True)
    assert isinstance(apart.model, PeftModel) and apart.info["quantization"] == kind
    layers = zip(find_blocks(apart.model), find_blocks(load("organism", quantization=kind).model), strict=True)
    for a, b in layers:
        assert torch.equal(decoded(a.o_proj.base_layer), decoded(b.o_proj))


@pytest.mark.slow
def test_a_control_is_packed_as_the_run_was(run, tmp_path):
    (control,) = make_controls(run, ["equal-compute"], tmp_path)
    record = read_run(control.ref)
    assert record["method"] == "sft" and record["config"]["quantization"] == record["model"]["quantization"] == "nf4"


@pytest.mark.slow
def test_from_the_command_line(tmp_path, capsys):
    out, job = tmp_path / "sft", tmp_path / "job"
    common = ["--quantization", "nf4", "--max-steps", "2", "--max-length", "64", "--per-device-train-batch-size", "2"]
    assert (
        main(["align", "sft", "--model", "organism", "--safety-data", "organism", *common, "--output-dir", str(out)])
        == 0
    )
    assert (
        main(["finetune", "sft", "--model", str(out), "--task-data", "organism", *common, "--output-dir", str(job)])
        == 0
    )
    assert read_run(job)["model"]["quantization"] == "nf4" and read_run(job)["parent"] == str(out)
    scored = [
        "--safety-data",
        "organism",
        "--limit",
        "2",
        "--max-new-tokens",
        "4",
        "--output-dir",
        str(tmp_path / "score"),
    ]
    assert main(["score", "--model", str(job), *scored]) == 0
    assert read_run(tmp_path / "score")["model"]["quantization"] is None
    capsys.readouterr()
    for verb, arguments, message in (
        ("align", ["--quantization", "nf5"], "unknown quantization 'nf5'; did you mean 'nf4'?"),
        ("align", ["--quantization", "int8", "--full-weights"], "leave out --full-weights or --quantization"),
        ("finetune", ["--quantization", "nf4", "--full-weights"], "leave out --full-weights or --quantization"),
        (
            "finetune",
            ["--quantization", "nf4", "--screen", "report"],
            "screen the rows in a run without --quantization",
        ),
    ):
        data = ["--safety-data", "organism", *(["--task-data", "organism"] if verb == "finetune" else [])]
        assert main([verb, "sft", "--model", "organism", *data, *arguments, "--output-dir", str(tmp_path / "no")]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1 and not (tmp_path / "no").exists()


def test_what_cannot_be_packed_is_named(monkeypatch):
    small = GPT2LMHeadModel(GPT2Config(n_embd=32, n_head=2, n_layer=2, vocab_size=50, n_positions=16))
    with pytest.raises(
        UsageError, match=r"GPT2LMHeadModel hold weights outside of linear layers \(attn.c_attn.weight, a Conv1D"
    ):
        quantize(small, "nf4")
    assert not hasattr(small, "is_loaded_in_4bit")
    with pytest.raises(UsageError, match="LlamaForCausalLM is quantised already"):
        quantize(packed("nf4", 1), "int8")
    with pytest.raises(UsageError, match="comes with an adapter; merge it"):
        quantize(adapted(tiny_llama(1)), "nf4")
    with pytest.raises(UsageError, match="unknown quantization 'int4'"):
        quantize(tiny_llama(1), "int4")
    monkeypatch.delitem(sys.modules, "tunevax.modeling.packing")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UsageError, match=r"needs bitsandbytes; pip install 'tunevax\[quant\]'"):
        require_quantization("nf4")  # before any data is read
