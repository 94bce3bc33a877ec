"""The tiny deterministic Llama, LoRA and batches that every number in golden/golden.json belongs to."""

import copy
import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

GOLDEN_RTOL = 1e-5
"""How well the golden values are known: the released code computed them in fp32."""

GOLDEN = json.loads((Path(__file__).parent / "golden" / "golden.json").read_text())


def in_float64(model):
    """The model in float64 throughout, where an identity of algebra holds to 1e-9 on any processor.

    transformers' Llama takes its norms and its rotary angles in fp32 whatever it is given: they are replaced here.
    """
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                norm = torch.nn.RMSNorm(child.weight.shape, child.variance_epsilon)
                norm.weight = child.weight
                setattr(module, name, norm)
            elif type(child).__name__ == "LlamaRotaryEmbedding":
                setattr(module, name, Angles(child.inv_freq, child.attention_scaling))
    return model.double()


class Angles(torch.nn.Module):
    """cos and sin of position times frequency, [batch, tokens, head size], in the precision of `x`."""

    def __init__(self, frequencies, scaling):
        super().__init__()
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.scaling = scaling

    def forward(self, x, position_ids):
        each = position_ids[..., None].to(x.dtype) * self.frequencies
        both = torch.cat([each, each], dim=-1)
        return both.cos() * self.scaling, both.sin() * self.scaling


def tiny_llama(layers: int = 8, attn: str = "sdpa", dtype: torch.dtype = torch.float64) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5, tie_word_embeddings=False,
        pad_token_id=None, bos_token_id=1, eos_token_id=2, attn_implementation=attn,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(1234)
    parameters = dict(model.named_parameters())
    for name in sorted(parameters):
        weight = parameters[name]
        noise = torch.randn(weight.shape, generator=generator)
        std = (
            0.5 if "embed_tokens" in name else 0.15 if any(n in name for n in ("lm_head", "q_proj", "k_proj")) else 0.1
        )
        weight.data = noise * std if weight.dim() > 1 else 1 + 0.2 * noise
    return in_float64(model) if dtype == torch.float64 else model.to(dtype)


def short_name(name: str) -> str:
    """layers.{i}.{self_attn|mlp}.{module}.lora_{A|B} of a PEFT parameter name."""
    return name.replace("base_model.model.model.", "").replace(".default.weight", "")


def tiny_lora(layers: int = 8, attn: str = "sdpa", dtype: torch.dtype = torch.float64):
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=8, lora_alpha=4, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama(layers, attn, dtype), config)
    generator = torch.Generator().manual_seed(4321)
    adapters = {short_name(n): p for n, p in model.named_parameters() if "lora_" in n}
    for name in sorted(adapters):
        scale = 0.2 if name.endswith("lora_A") else 0.1
        adapters[name].data = (torch.randn(adapters[name].shape, generator=generator) * scale).to(dtype)
    return model


def batch(name: str) -> dict[str, torch.Tensor]:
    """The golden batch `safe` or `harmful`, 4 x 24."""
    return {k: torch.tensor(GOLDEN["data"][name][k]) for k in ("input_ids", "attention_mask", "labels")}


def rows(name: str) -> list[dict]:
    """The same batch as encoded rows without padding."""
    data = batch(name)
    keep = [int(m.sum()) for m in data["attention_mask"]]
    return [
        {"input_ids": data["input_ids"][i, :n].tolist(), "labels": data["labels"][i, :n].tolist()}
        for i, n in enumerate(keep)
    ]


def encoded(monkeypatch, **by_answer: list[dict]) -> None:
    """Give trainers these encoded rows for rows whose answer is the key: `c=rows("safe"), r=rows("harmful")`."""

    def encode(data, *_, answer="completion", **__):
        return copy.deepcopy(by_answer[data[0][answer]])

    monkeypatch.setattr("tunevax.modeling.method.encode", encode)


class TinyTokenizer:
    """What a trainer asks of a tokenizer when its rows are already token ids."""

    pad_token_id = eos_token_id = 2
    chat_template = "x"

    def save_pretrained(self, folder: str) -> None:
        Path(folder, "tokenizer_config.json").write_text("{}")


def gradients(model) -> dict[str, list[float]]:
    """Name to [L2 norm, <grad, param>] for every parameter that has a gradient."""
    return {
        short_name(n): [p.grad.norm().item(), (p.grad * p).sum().item()]
        for n, p in model.named_parameters()
        if p.grad is not None
    }


def assert_gradients(found: dict, expected: dict, rtol: float = 1e-9) -> None:
    assert set(found) == set(expected), sorted(set(found) ^ set(expected))[:5]
    for name, (norm, inner) in expected.items():
        assert abs(found[name][0] - norm) <= rtol * norm, (name, found[name], norm)
        assert abs(found[name][1] - inner) <= rtol * max(norm, abs(inner)), (name, found[name], inner)


def loss_of(model, inputs):
    """The mean cross entropy of the stock model over its labels: `model(...).loss` would be taken in fp32."""
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs.get("attention_mask")).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())
