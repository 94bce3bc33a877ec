"""What is wrong with a checkpoint, an adapter or a merge is named, and what an adapter reaches is recorded."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import tiny_llama
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4Config,
    Llama4ForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
)

from tunevax.errors import UsageError
from tunevax.modeling import load, loading
from tunevax.modeling.adapters import arrived, effect, merge, merge_layers
from tunevax.modeling.trainables import coverage, left_out_of_blocks, prepare_trainables
from tunevax.modeling.trainer import TrainConfig
from tunevax.organism import path as organism
from tunevax.training import save_weights

IDS = torch.tensor([[1, 40, 50, 60, 70]])
SMALL = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64,
)  # fmt: skip


def save(model, folder: Path, **how) -> Path:
    """A model folder with the organism's tokenizer."""
    model.save_pretrained(folder, **how)
    for file in organism().glob("*token*"):
        shutil.copy(file, folder)
    shutil.copy(organism() / "chat_template.jinja", folder)
    return folder


@pytest.fixture
def base(tmp_path) -> Path:
    return save(tiny_llama(2).float(), tmp_path / "base")


@pytest.fixture
def tied(tmp_path) -> Path:
    model = tiny_llama(2).float()
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    return save(model, tmp_path / "tied")


def adapter(base: Path, scale: float = 0.1, dtype=None, **config) -> tuple[Path, torch.Tensor]:
    """An adapter folder beside `base`, and the logits that it was saved with."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    options = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **config}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(model, LoraConfig(**options)).eval()
        generator = torch.Generator().manual_seed(1)
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.data += torch.randn(parameter.shape, generator=generator) * scale
        model.save_pretrained(base.parent / "adapter")
    with torch.no_grad():
        return base.parent / "adapter", model(IDS).logits


def rewrite(file: Path, change) -> None:
    save_file(change(load_file(file)), file, {"format": "pt"})


def logits_of(ref, **how) -> torch.Tensor:
    with torch.no_grad():
        return load(str(ref), device="cpu", **how).model(IDS).logits


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            lambda w: {k: v for k, v in w.items() if "layers.1.self_attn.q" not in k},
            r"1 missing \(model.layers.1.self_",
        ),
        (lambda w: {**w, "v_head.weight": torch.zeros(1, 64)}, r"1 not of this model \(v_head.weight\)"),
        (
            lambda w: {**w, "lm_head.weight": torch.zeros(98, 64)},
            r"lm_head.weight is \[98, 64\] in .* \[97, 64\] in the",
        ),
        (lambda w: {f"module.{k}": v for k, v in w.items()}, "whose prefix is 'module.'"),
    ],
)
def test_weights_that_do_not_fit_are_named(base, change, named):
    rewrite(base / "model.safetensors", change)
    with pytest.raises(UsageError, match=named):
        load(str(base))


def test_what_transformers_leaves_out_by_design_is_no_fault(base, tied, tmp_path):
    rewrite(base / "model.safetensors", lambda w: {**w, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    assert "lm_head.weight" not in load_file(tied / "model.safetensors")
    config = Llama4Config(
        text_config={**SMALL, "intermediate_size_mlp": 48, "num_local_experts": 2, "head_dim": 8},
        vision_config=dict(
            hidden_size=32, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, image_size=28,
            patch_size=14, vision_output_dim=32, projector_input_dim=32, projector_output_dim=32,
        ),
    )  # fmt: skip
    seeing = save(Llama4ForConditionalGeneration(config), tmp_path / "seeing")
    for folder in (base, tied, seeing):
        load(str(folder))


def test_a_missing_expert_is_named(tmp_path):
    folder = save(MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=4)), tmp_path / "moe")
    rewrite(
        folder / "model.safetensors",
        lambda w: {k: v for k, v in w.items() if "1.block_sparse_moe.experts.2.w1" not in k},
    )
    with pytest.raises(UsageError, match="put together for model.layers.1.mlp.experts.gate_up_proj"):
        load(str(folder))


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("model-00002-of-*.safetensors", lambda b: b[:-9], "model-00002-of-.*cut short: .* bytes; download it again"),
        ("model-00002-of-*.safetensors", lambda b: b"", r"cut short or no safetensors file \(0 bytes\)"),
        (
            "model-00002-of-*.safetensors",
            lambda b: POINTER,
            "git-lfs pointer and not the file itself; run `git lfs pull`",
        ),
        ("model-00002-of-*.safetensors", lambda b: None, r"lacks model-00002-of-\d+.safetensors \(1 of \d files"),
        ("tokenizer.json", lambda b: POINTER, "tokenizer.json is a git-lfs pointer"),
        ("tokenizer.json", lambda b: b[:99], "cannot load the tokenizer"),
        ("config.json", lambda b: POINTER, "config.json is a git-lfs pointer"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, said):
    folder = save(tiny_llama(2).float(), tmp_path / "base", max_shard_size="200KB")
    file = next(folder.glob(name))
    changed = content(file.read_bytes())
    file.unlink() if changed is None else file.write_bytes(changed)
    with pytest.raises(UsageError, match=said):
        load(str(folder))


def test_a_torch_file_that_was_cut_short_is_named(base):
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    assert logits_of(base).isfinite().all()
    (base / "pytorch_model.bin").write_bytes((base / "pytorch_model.bin").read_bytes()[:-1000])
    with pytest.raises(UsageError, match="pytorch_model.bin is cut short"):
        load(str(base))


@pytest.mark.parametrize("kind", ["gptq", "awq", "hqq", "compressed-tensors"])
def test_a_quantisation_without_its_library_is_one_sentence(base, kind):
    config = json.loads((base / "config.json").read_text())
    quantization = {"quantization_config": {"quant_method": kind, "bits": 4}}
    (base / "config.json").write_text(json.dumps({**config, **quantization}))
    with pytest.raises(UsageError, match="needs a library that is not installed here: .*(pip install|instructions)"):
        load(str(base))


def test_a_head_that_differs_from_the_embedding_is_no_longer_called_tied(tied):
    rewrite(tied / "model.safetensors", lambda w: {**w, "lm_head.weight": torch.ones(97, 64)})
    model = load(str(tied)).model
    assert not model.config.tie_word_embeddings and (model.lm_head.weight == 1).all()


# --- adapters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            lambda w: {f"x.{k}": v for k, v in w.items()},
            "8 of its weights are missing.*8 belong nowhere, such as x.base",
        ),
        (
            lambda w: {k: v for k, v in w.items() if "1.self_attn.q_proj.lora_B" not in k},
            "1 of its weights are missing",
        ),
        (lambda w: {k.replace("layers.1.", "layers.9."): v for k, v in w.items()}, "4 belong nowhere.*layers.9"),
        (
            lambda w: {k: v[..., :3].contiguous() for k, v in w.items()},
            "does not fit LlamaForCausalLM.*is it of another base",
        ),
        (lambda w: {k: v * torch.nan for k, v in w.items()}, "the logits are not finite"),
        (lambda w: {k: v * (".lora_A." in k) for k, v in w.items()}, "moves no logit: its B matrices are all 0"),
    ],
)
@pytest.mark.parametrize("merged", [True, False])
def test_an_adapter_that_does_not_work_is_refused(base, change, named, merged):
    folder, _ = adapter(base)
    rewrite(folder / "adapter_model.safetensors", change)
    with pytest.raises(UsageError, match=named):
        load(str(folder), merge=merged)


def test_damaged_adapters_are_named(base):
    folder, _ = adapter(base)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        kept = (folder / name).read_bytes()
        (folder / name).write_bytes(POINTER)
        with pytest.raises(UsageError, match=f"{name} is a git-lfs pointer"):
            load(str(folder))
        (folder / name).write_bytes(kept[:40])
        with pytest.raises(UsageError, match=f"{name} (is cut short|cannot be read)"):
            load(str(folder))
        (folder / name).write_bytes(kept)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UsageError, match="has an adapter_config.json and no weights"):
        load(str(folder))


def test_an_adapter_with_embeddings_of_another_base_is_refused(base):
    folder, _ = adapter(base, target_modules=["embed_tokens"])
    rewrite(base / "model.safetensors", lambda w: {k: v + ("embed" in k) for k, v in w.items()})
    with pytest.raises(UsageError, match="adapter of another base: model.embed_tokens differs"):
        load(str(folder))


def test_a_run_whose_base_has_changed_is_refused(base, tmp_path):
    folder, _ = adapter(base)
    run = tmp_path / "run"
    shutil.copytree(folder, run / "adapter")
    info = load(str(base)).info
    (run / "run.json").write_text(json.dumps({"verb": "align", "parent": None, "model": info}))
    load(str(run))
    rewrite(base / "model.safetensors", lambda w: {k: v * 1.01 for k, v in w.items()})
    with pytest.raises(UsageError, match="base has changed since .*run was trained on it"):
        load(str(run))


def test_prompt_tuning_is_refused_by_name(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).save_pretrained(
        tmp_path / "p"
    )
    with pytest.raises(UsageError, match="of kind PROMPT_TUNING, which adds to the prompt"):
        load(str(tmp_path / "p"))


def test_an_adapter_with_more_embeddings_brings_them(base):
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(99)
    save(model, base.parent / "grown")
    folder, expected = adapter(base.parent / "grown", modules_to_save=["embed_tokens", "lm_head"])
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))
    torch.testing.assert_close(logits_of(folder), expected, rtol=1e-4, atol=1e-4)


# --- merging ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [40, 50]},
        {"use_dora": True},
        {"use_rslora": True},
    ],
)
def test_a_merge_into_a_tied_model_is_what_was_trained_and_loads_again(tied, tmp_path, config):
    """float64: merged and unmerged are one function, so nothing but rounding is between them."""
    folder, _ = adapter(tied, **config)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tied), folder).double()
        expected = model(IDS).logits
        merged, result = merge(model, "it")
        torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-9, atol=1e-9)
        assert result.off < 1e-9 and result.kept == 1 and result.along == 1
        merged.float().save_pretrained(tmp_path / "again")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
        assert torch.equal(again(IDS).logits, merged(IDS).logits)


def test_a_merge_that_is_another_model_is_refused(tied, monkeypatch):
    folder, _ = adapter(tied, target_modules=["lm_head"])
    monkeypatch.setattr("tunevax.modeling.adapters.untie", lambda model: None)
    with pytest.raises(UsageError, match="cannot be merged into LlamaForCausalLM"):
        load(str(folder))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("share", "refused"), [(0.0, True), (0.5, True), (2.0, True), (1.0, False)])
def test_a_merge_that_puts_a_part_of_the_update_in_is_refused(monkeypatch, dtype, share, refused):
    """The adapter moves the logits by a few per cent, which is less than bf16 might move those of a deep model."""
    torch.manual_seed(3)
    stock = tiny_llama(8).to(getattr(torch, dtype))
    model = get_peft_model(stock, LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.02)
    apart, move = effect(model, "it")
    assert 0.01 < float(move.norm() / apart.norm()) < 0.1
    before = {name: value.clone() for name, value in stock.state_dict().items()}
    unload = model.merge_and_unload

    def partly():
        merged = unload()
        for name, value in merged.state_dict().items():
            old = before.get(name, before.get(name.replace(".weight", ".base_layer.weight")))
            value.copy_(old.double() + share * (value.double() - old.double()))
        return merged

    model.merge_and_unload = partly
    if refused:
        with pytest.raises(UsageError, match=f"merging it into {dtype} weights keeps .* of its effect on the logits"):
            merge(model, "it")
    else:
        assert 0.9 < merge(model, "it")[1].along < 1.1


def test_an_effect_that_rounding_hides_is_no_lost_one():
    """With nothing but rounding in the logits, unmerged and merged, what they share is the base's own error."""
    torch.manual_seed(0)
    signal = torch.randn(4096, dtype=torch.float64)
    for noise in (0.0, 0.3, 1.0, 3.0, 100.0):
        base, apart, merged = (noise * torch.randn(4096, dtype=torch.float64) + k * signal for k in (0, 1, 1))
        half = merged - signal / 2
        move = apart - base
        for made, right in ((merged, True), (base, False), (half, noise > 0.9)):
            off = float((made - apart).norm() / move.norm())
            assert arrived(off, float((made - base) @ move / (move @ move))) is right


def test_an_adapter_that_peft_cannot_merge_is_named(base):
    folder, _ = adapter(base, lora_bias=True)
    with pytest.raises(UsageError, match="cannot be merged into LlamaForCausalLM: Impossible to merge"):
        load(str(folder))


@pytest.mark.parametrize(("step", "kept"), [(2.0**-10, 0.0), (2.0**-7, 1.0)])
def test_the_share_that_bf16_keeps(step, kept):
    """Between 1 and 2 bf16 numbers are 2^-7 apart: a smaller step is rounded away whole, and this one stays whole."""
    model = get_peft_model(tiny_llama(1).bfloat16(), LoraConfig(r=1, lora_alpha=1, target_modules=["q_proj"]))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.base_layer.weight.data.fill_(1)
    layer.lora_A["default"].weight.data.fill_(1)
    layer.lora_B["default"].weight.data.fill_(step)
    assert merge_layers(model) == kept
    assert (layer.base_layer.weight == 1 + step * kept).all()


@pytest.mark.slow
@pytest.mark.parametrize("factor", [1e-2, 1e-4])
def test_an_update_that_bf16_rounds_away_is_refused_or_merged_in_fp32(base, monkeypatch, factor):
    """In bf16 the larger of the two moves some logits before the merge and fewer after, and the smaller moves none."""
    folder, _ = adapter(base)
    rewrite(folder / "adapter_model.safetensors", lambda w: {k: v * factor for k, v in w.items()})
    said = r"into bfloat16 weights keeps \d\d?% of its update" if factor == 1e-2 else "moves no logit in bfloat16"
    with pytest.raises(UsageError, match=f"{said}.*; use --dtype float32"):
        load(str(folder), dtype="bfloat16")

    asked, real = [], loading.causal_model  # as on an accelerator, where auto is the checkpoint's dtype

    def checkpoint_in_bf16(base, revision, dtype):
        asked.append(dtype)
        return real(base, revision, "bfloat16" if len(asked) == 1 else dtype)

    monkeypatch.setattr(loading, "causal_model", checkpoint_in_bf16)
    info = load(str(folder)).info
    assert (
        len(asked) == 2 and info["dtype"] == info["merges"][0]["dtype"] == "float32" and "bfloat16" in info["widened"]
    )
    assert info["merges"][0]["kept"] == 1 and load(str(folder), dtype="float32").info["widened"] is None


@pytest.mark.slow
def test_a_base_saved_in_4_bits_is_decoded_before_a_merge(base, tmp_path):
    pytest.importorskip("bitsandbytes")
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    save(AutoModelForCausalLM.from_pretrained(base, quantization_config=how, dtype=torch.float32), tmp_path / "packed")
    folder, _ = adapter(base)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": str(tmp_path / "packed")})
    )
    loaded = load(str(folder))
    assert loaded.info["saved_in"] == "bitsandbytes" and loaded.info["merges"][0]["off"] < 1e-3
    assert {type(m).__name__ for m in loaded.model.modules()} & {"Linear", "Linear4bit"} == {"Linear"}
    # The unmerged adapter stays on 4 bits, as it was trained.
    torch.testing.assert_close(
        loaded.model(IDS).logits, load(str(folder), merge=False).model(IDS).logits, rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("name", ["base", "tied"])
def test_a_full_weight_run_loads_to_the_same_logits(name, request, tmp_path):
    from types import SimpleNamespace

    loaded = load(str(request.getfixturevalue(name)))
    args = TrainConfig(str(tmp_path / "out"), full_weights=True)
    model = prepare_trainables(loaded.model, args)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01
        expected = model(IDS).logits
    accelerator = SimpleNamespace(unwrap_model=lambda model: model)
    trainer = SimpleNamespace(args=args, accelerator=accelerator, model=model, processing_class=loaded.tokenizer)
    save_weights(trainer, tmp_path, "")
    assert torch.equal(logits_of(tmp_path / "model"), expected)


# --- what gets an adapter --------------------------------------------------------------------------------------------


def moe(kind: str):
    if kind == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=4)).eval()
    types = ["sliding_attention", "full_attention"]
    return GptOssForCausalLM(GptOssConfig(**SMALL, head_dim=8, num_local_experts=4, layer_types=types)).eval()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt-oss", "mixtral"])
def test_all_linear_reaches_experts_and_the_adapter_loads_again(kind, tmp_path):
    folder = save(moe(kind), tmp_path / "moe")
    model = prepare_trainables(AutoModelForCausalLM.from_pretrained(folder), TrainConfig("x", lora_r=2)).eval()
    covered = coverage(model)
    assert {"model.layers.*.mlp.experts.gate_up_proj", "model.layers.*.mlp.experts.down_proj"} <= set(
        covered["adapted"]
    )
    assert set(covered["left_out"]) == {"model.embed_tokens", "lm_head"} and left_out_of_blocks(covered) is None
    total = sum(p.numel() for n, p in AutoModelForCausalLM.from_pretrained(folder).named_parameters()
                if p.dim() > 1 and not n.endswith("bias"))  # fmt: skip
    assert sum(covered["adapted"].values()) + sum(covered["left_out"].values()) == total
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter += 0.05
        expected = model(IDS).logits
    model.peft_config["default"].base_model_name_or_path = str(folder)
    model.save_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits_of(tmp_path / "adapter"), expected, rtol=1e-4, atol=1e-4)


def test_what_has_no_adapter_is_said():
    covered = coverage(prepare_trainables(moe("gpt-oss"), TrainConfig("x", lora_targets="q_proj, experts.down_proj")))
    assert set(covered["adapted"]) == {"model.layers.*.self_attn.q_proj", "model.layers.*.mlp.experts.down_proj"}
    said = left_out_of_blocks(covered)
    assert said.startswith("no adapter on ") and "mlp.experts.gate_up_proj" in said and "down_proj" not in said


@pytest.mark.parametrize("targets", ["q_proj,v_porj", "v_porj"])
def test_each_name_of_lora_targets_must_match(targets):
    with pytest.raises(UsageError, match="v_porj"):
        prepare_trainables(tiny_llama(1).float(), TrainConfig("x", lora_targets=targets))


def test_dropout_on_fused_experts_is_refused_by_name():
    with pytest.raises(UsageError, match=r"no dropout for .* GptOssForCausalLM \(mlp.experts.down_proj"):
        prepare_trainables(moe("gpt-oss"), TrainConfig("x", lora_dropout=0.1))


def test_weights_that_are_no_numbers_are_refused_by_name(tmp_path):
    folder = save(tiny_llama(2, dtype=torch.float32), tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.self_attn.q_proj.weight"][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=r"not finite numbers \(model\.layers\.1\.self_attn\.q_proj\.weight\)"):
        load(str(folder))
