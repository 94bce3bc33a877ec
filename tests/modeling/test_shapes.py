"""Models that are built otherwise than Llama: each works, or a sentence names what it lacks before the first step."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny import TinyTokenizer, rows, tiny_llama
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    GenerationConfig,
    LlamaForCausalLM,
)

from tunevax.data.encoding import ids_of
from tunevax.errors import UsageError
from tunevax.finetuning.ewc import factored_fisher, weighted_square
from tunevax.methods import load_method
from tunevax.modeling import load
from tunevax.modeling.blocks import find_blocks, find_final_norm
from tunevax.modeling.loss import last_hidden, response_loss
from tunevax.modeling.shapes import can_replay, require_language_model, settle_config, settle_tokens
from tunevax.modeling.trainables import prepare_trainables

SMALL = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
HYBRID = dict(layer_types=["linear_attention", "full_attention"] * 2, head_dim=8)
GEMMA4 = dict(
    head_dim=8, global_head_dim=8, hidden_size_per_layer_input=8, vocab_size_per_layer_input=97, sliding_window=8,
    layer_types=["sliding_attention", "full_attention"] * 2, num_kv_shared_layers=0,
)  # fmt: skip
KINDS = {
    "opt": ("opt", dict(ffn_dim=48, word_embed_proj_dim=32, dropout=0.0)),
    "gemma4": ("gemma4_text", dict(GEMMA4, num_kv_shared_layers=2)),
    "gemma4-experts": (
        "gemma4_text",
        dict(GEMMA4, enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=16),
    ),
    "llama4": (
        "llama4_text",
        dict(
            intermediate_size_mlp=48, num_local_experts=2, moe_layers=[1, 3], no_rope_layers=[1, 1, 1, 0], head_dim=8
        ),
    ),
    "qwen3.5": (
        "qwen3_5_text",
        dict(
            HYBRID,
            linear_num_value_heads=4,
            linear_num_key_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
        ),
    ),
    "mixtral": ("mixtral", dict(num_local_experts=3, num_experts_per_tok=2)),
    "granite-hybrid": (
        "granitemoehybrid",
        dict(
            layer_types=["mamba", "attention"] * 2, num_local_experts=2, num_experts_per_tok=1,
            shared_intermediate_size=16, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, logits_scaling=3.0,
        ),
    ),
    "mamba": ("mamba", dict(state_size=4, time_step_rank=4)),
    "falcon-h1": (
        "falcon_h1",
        dict(
            mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1, head_dim=8,
            lm_head_multiplier=0.3,
        ),
    ),
    "recurrent-gemma": ("recurrent_gemma", dict(lru_width=32, attention_window_size=16, head_dim=8)),
}  # fmt: skip
WORKS = None
TABLE = [
    ("opt", "repnoise", WORKS),
    ("gemma4", "repnoise", WORKS),
    ("gemma4", "tar", WORKS),
    ("gemma4-experts", "repnoise", WORKS),
    ("llama4", "sft", WORKS),
    ("llama4", "repnoise", WORKS),
    ("qwen3.5", "sft", WORKS),
    ("qwen3.5", "vaccine", WORKS),
    ("qwen3.5", "circuit-breakers", WORKS),
    ("qwen3.5", "ldifs", WORKS),
    ("qwen3.5", "surgery", "block 0 of Qwen3_5ForCausalLM has an attention that does not go through"),
    ("mixtral", "ewc", WORKS),
    ("granite-hybrid", "lisa", WORKS),
    (
        "granite-hybrid",
        "repnoise",
        "blocks of GraniteMoeHybridForCausalLM have no recognisable MLP: .*plain sft does not",
    ),
    ("mamba", "sft", WORKS),
    ("mamba", "booster", WORKS),
    ("mamba", "repnoise", "the blocks of MambaForCausalLM have no recognisable MLP: looked for .*repnoise needs it"),
]
OPTIONS = {
    "t-vaccine": {"gamma": 2, "probe_size": 2},
    "tar": {"mapping_steps": 1, "inner_steps": 1, "tamper_interval": 1, "max_steps": 2},
    "lisa": {"k1": 1, "k2": 1},
}
FINETUNING = ("surgery", "ldifs", "ewc", "lisa")
DATA = [
    {"prompt": f"p{i}", "completion": "c", "chosen": f"a{i}", "rejected": f"b{i}", "category": None} for i in range(24)
]


class Words(TinyTokenizer):
    """With words, which Surgery tells from the end of a row."""

    def decode(self, ids, skip_special_tokens=False):
        return " ".join(str(i) for i in ids if not skip_special_tokens or i != self.eos_token_id)


def tiny(kind, **changes):
    name, more = KINDS[kind]
    torch.manual_seed(0)
    values = {**SMALL, **more, **changes}
    if name == "opt":
        values = {k: v for k, v in values.items() if k not in ("intermediate_size", "num_key_value_heads")}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**values))
    head = model.get_output_embeddings().weight
    head.data = torch.randn(head.shape, generator=torch.Generator().manual_seed(1))  # logits that a soft cap moves
    return model.eval()


@pytest.fixture
def encoded(monkeypatch):
    """Rows are token ids already: `chosen` and what a customer gives are the golden safe ones."""
    golden = {"a": rows("safe"), "b": rows("harmful")}

    def encode(data, *_, answer="completion", **__):
        return [dict(golden["b" if row[answer][0] == "b" else "a"][i % 4]) for i, row in enumerate(data)]

    monkeypatch.setattr("tunevax.modeling.method.encode", encode)


def trainer_of(model, method, folder, **options):
    group = "finetuning" if method in FINETUNING else "alignment"
    cls = load_method(f"tunevax.{group}", method)
    args = cls.config_class(
        str(folder), per_device_train_batch_size=2, report_to="none", use_cpu=True, save_strategy="no",
        **{"max_steps": 1, "warmup_steps": 0, **OPTIONS.get(method, {}), **options},
    )  # fmt: skip
    task = DATA if method in FINETUNING else None
    return cls(model, args, safety_data=DATA, task_data=task, processing_class=Words())


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "method", "refusal"), TABLE, ids=lambda value: value or "works")
def test_a_method_on_an_architecture(kind, method, refusal, encoded, tmp_path):
    model = tiny(kind)
    if refusal:
        with pytest.raises(UsageError, match=refusal):
            trainer_of(model, method, tmp_path)
        return
    trainer = trainer_of(model, method, tmp_path)
    torch.manual_seed(1)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    moved = {id(p): p.detach().clone() for p in trainer.parameters}
    trainer.train()
    assert all(torch.isfinite(torch.tensor(line["loss"])) for line in trainer.state.log_history if "loss" in line)
    unmoved = [p for p in trainer.parameters if torch.equal(p, moved[id(p)])]
    above = method in ("circuit-breakers", "t-vaccine")  # blocks above the targets, blocks that were not drawn
    assert len(unmoved) < len(trainer.parameters) if above else not unmoved


# --- blocks ----------------------------------------------------------------------------------------------------------


def test_in_a_hybrid_a_linear_attention_stands_where_attention_does():
    model = tiny("qwen3.5")
    blocks = find_blocks(model, "attention", "mlp")
    assert [type(b.attention).__name__ for b in blocks[:2]] == ["Qwen3_5GatedDeltaNet", "Qwen3_5Attention"]
    with pytest.raises(UsageError, match=r"blocks 0, 2 of Qwen3_5ForCausalLM have no recognisable attention output"):
        find_blocks(model, "o_proj")


@pytest.mark.slow
def test_a_model_without_known_blocks_trains_by_sft_alone(encoded, tmp_path):
    model = tiny_llama(2)
    model.config.num_hidden_layers = 3
    trainer = trainer_of(model, "sft", tmp_path)
    trainer.train()
    assert trainer.state.global_step == 1
    with pytest.raises(UsageError, match=r"no decoder blocks found in LlamaForCausalLM.*vaccine needs it"):
        trainer_of(model, "vaccine", tmp_path)
    with pytest.raises(UsageError, match="leave out --checkpoint-blocks all"):
        trainer_of(model, "sft", tmp_path, checkpoint_blocks="all")


def test_the_final_norm_is_what_the_head_is_given():
    model = tiny("gemma4")
    assert find_final_norm(model) is model.model.norm
    require_language_model(model, find_blocks(model), ("module", "norm"))

    def halve(_module, _args, output):
        output["last_hidden_state"] = output["last_hidden_state"] / 2
        return output

    model.model.register_forward_hook(halve)
    with pytest.raises(UsageError, match="between the final norm of Gemma4ForCausalLM and its head"):
        require_language_model(model, find_blocks(model), ("norm",))


def test_repnoise_sees_rows_and_tokens_apart_where_opt_flattens_them(encoded, tmp_path):
    trainer = trainer_of(tiny("opt"), "repnoise", tmp_path)
    inputs = trainer.data_collator(trainer.train_dataset[:2])
    seen = {}
    for i, block in enumerate(trainer.blocks):
        block.mlp.register_forward_hook(lambda _m, _a, output, i=i: seen.__setitem__(i, output))
    found = trainer.forward(trainer.model, inputs)
    tokens = inputs["input_ids"].shape[1]
    for i, activation in enumerate(found.activations):
        assert activation.shape == (2, tokens, 32)
        assert torch.equal(activation, seen[i].view(4, tokens, 32)[2:])


def test_blocks_that_share_keys_run_twice():
    shared, apart = tiny("gemma4"), tiny("gemma4", num_kv_shared_layers=0)
    assert not can_replay(shared, [b.module for b in find_blocks(shared)])
    assert can_replay(apart, [b.module for b in find_blocks(apart)])


# --- the model as a whole --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["recurrent-gemma", "falcon-h1"])
def test_the_loss_is_the_models_own(kind):
    model = tiny(kind)
    inputs = {k: torch.tensor([row]) for k, row in rows("safe")[0].items()}
    stock = model(**inputs, use_cache=False)
    assert response_loss(model, inputs).item() == pytest.approx(stock.loss.item(), rel=1e-5)
    require_language_model(model)


def test_a_scale_behind_the_head_that_nobody_knows_is_refused():
    class Scaled(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 1.01
            return output

    model = Scaled(tiny_llama(2).config)
    with pytest.raises(UsageError, match="Scaled does something to its logits behind its head"):
        require_language_model(model)


def test_what_predicts_from_later_tokens_is_refused(tmp_path):
    sizes = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    require_language_model(BertLMHeadModel(BertConfig(**sizes, is_decoder=True)))
    with pytest.raises(UsageError, match="BertLMHeadModel predicts a token from those behind it"):
        require_language_model(BertLMHeadModel(BertConfig(**sizes)))
    CONFIG_MAPPING["t5"](vocab_size=97).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"is an encoder-decoder model \(T5Config\)"):
        load(str(tmp_path))


def test_a_prompt_that_was_trained_is_no_adapter_to_go_on_with(tmp_path):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(tiny_llama(2), config)
    with pytest.raises(UsageError, match="an adapter of kind PROMPT_TUNING"):
        prepare_trainables(model, SimpleNamespace(full_weights=False))


# --- LoRA and EWC on what is not a plain linear layer ----------------------------------------------------------------


def lora_paths(kind, tmp_path, encoded):
    model = trainer_of(tiny(kind), "sft", tmp_path).model
    return {name.rpartition(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A." in name}


def test_all_linear_leaves_out_what_is_linear_by_class_alone(encoded, tmp_path):
    llama4 = lora_paths("llama4", tmp_path, encoded)
    assert not any(path.endswith("router") for path in llama4)
    assert any(path.endswith("shared_expert.up_proj") for path in llama4)
    mamba = lora_paths("mamba", tmp_path, encoded)
    assert any(path.endswith("in_proj") for path in mamba)
    assert not any(path.endswith("out_proj") for path in mamba)


@pytest.mark.parametrize("name", ["experts.gate_up_proj", "experts.down_proj"])
def test_ewc_weighs_each_expert_as_a_matrix_of_its_own(encoded, tmp_path, name):
    model = tiny("mixtral").double()
    model.set_experts_implementation("eager")  # the fused kernel has no float64
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=[], target_parameters=[name], task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    inputs = [{k: torch.tensor([row[k]]) for k in ("input_ids", "labels")} for row in rows("safe")[:2]]
    inputs = [{**i, "attention_mask": torch.ones_like(i["input_ids"])} for i in inputs]
    adapted = factored_fisher(model, inputs)
    assert len(adapted) == 4
    exact = {}
    layers = [
        next(x for x in model.modules() if getattr(x, "lora_A", None) and x.lora_A["default"].weight is m.a)
        for m in adapted
    ]
    for i, layer in enumerate(layers):
        weight = layer.get_param().requires_grad_(True)
        squares = []
        for batch in inputs:
            (gradient,) = torch.autograd.grad(response_loss(model, batch), [weight])
            squares.append(gradient.square())
        exact[i] = torch.stack(squares).mean(0)  # [E, out, in]
        weight.requires_grad_(False)
    assert any(f.any() for f in exact.values())
    torch.manual_seed(0)
    for i, m in enumerate(adapted):
        r, c = exact[i].sum(2), exact[i].sum(1)
        torch.testing.assert_close(m.rows.square(), r, rtol=1e-9, atol=0)
        m.a.data.normal_(), m.b.data.normal_()
        dense = r[:, :, None] * c[:, None, :] / r.sum(1).clamp_min(1e-300)[:, None, None]
        expected = (dense * layers[i].get_delta_weight("default").square()).sum()
        torch.testing.assert_close(weighted_square(m), expected, rtol=1e-9, atol=0)


def test_ewc_names_an_adapter_that_it_cannot_weigh(encoded, tmp_path):
    with pytest.raises(UsageError, match=r"embed_tokens.*is none; leave it out of --lora-targets"):
        trainer_of(tiny_llama(2), "ewc", tmp_path, lora_targets="q_proj,embed_tokens")


# --- tokens ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def organism():
    return load("organism")


@pytest.fixture
def tokenizer(organism):
    from copy import deepcopy

    return deepcopy(organism.tokenizer)


def test_padding_beyond_the_embedding_is_the_end(organism, tokenizer):
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    settle_tokens(organism.model, tokenizer, "m")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id < len(organism.model.get_input_embeddings().weight)
    with pytest.raises(UsageError, match=r"'\[PAD\]', number \d+, and the model's embedding has \d+ rows"):
        ids_of(tokenizer, "words [PAD]")
    assert ids_of(tokenizer, "words")


def test_the_end_of_an_answer_is_the_templates_then_the_configs(organism, tokenizer):
    stock, special = organism.tokenizer, organism.tokenizer.eos_token
    tokenizer.eos_token = None
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}" + special + "{% endfor %}"
    settle_tokens(organism.model, tokenizer, "m")
    assert tokenizer.eos_token_id == stock.eos_token_id
    other = stock.convert_ids_to_tokens(30)
    tokenizer.eos_token, tokenizer.chat_template = None, "{% for m in messages %}{{ m.content }} {% endfor %}"
    model = SimpleNamespace(
        get_input_embeddings=organism.model.get_input_embeddings,
        generation_config=GenerationConfig(eos_token_id=[10**6, 30]), config=organism.model.config,
    )  # fmt: skip
    settle_tokens(model, tokenizer, "m")
    assert tokenizer.eos_token == other
    config = SimpleNamespace(eos_token_id=None, get_text_config=lambda: config)
    tokenizer.eos_token, model.generation_config, model.config = None, config, config
    with pytest.raises(UsageError, match=r"nothing ends an answer of m: .*set eos_token in tokenizer_config.json"):
        settle_tokens(model, tokenizer, "m")


def test_padding_beyond_the_embedding_in_the_config_does_not_stop_a_model(tmp_path):
    config = tiny_llama(1).config
    config.pad_token_id = 97
    settle_config(config, "m")
    assert config.pad_token_id is None
    LlamaForCausalLM(config)
    config.pad_token_id = 96
    settle_config(config, "m")
    assert config.pad_token_id == 96


def test_the_probe_leaves_the_model_as_it_was():
    model = tiny_llama(2).train()
    model.model.layers[0].eval()
    before = {name: m.training for name, m in model.named_modules()}
    require_language_model(model, find_blocks(model), ("module", "attention", "mlp"))
    assert {name: m.training for name, m in model.named_modules()} == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    last_hidden(model, {"input_ids": torch.tensor([[1, 2]])})
