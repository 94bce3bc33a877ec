"""Batched generation says exactly what one prompt at a time says, and drops the answers that have ended."""

import random
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from tunevax.cli import main
from tunevax.data.chat import render
from tunevax.data.encoding import ids_of
from tunevax.errors import UsageError
from tunevax.modeling import load
from tunevax.scoring import generation
from tunevax.scoring.generation import generate

CONTEXT, ENDS = 48, list(range(2, 439, 25))
SHAPE = dict(
    vocab_size=439, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, head_dim=8,
    num_key_value_heads=2, max_position_embeddings=CONTEXT, initializer_range=0.3, pad_token_id=0, eos_token_id=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def organism():
    return load("organism")


def _model(name):
    torch.manual_seed(3)
    model = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
        "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=7)),
        "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SHAPE, sliding_window=7)),
        "gpt2": lambda: GPT2LMHeadModel(
            GPT2Config(
                vocab_size=439,
                n_positions=CONTEXT,
                n_embd=32,
                n_layer=3,
                n_head=4,
                initializer_range=0.3,
                bos_token_id=1,
                eos_token_id=2,
            )  # fmt: skip
        ),
    }[name]()
    model.generation_config.eos_token_id = ENDS
    return model.eval()


def _prompts(tokenizer, count, longest):
    draw = random.Random(0)
    words = [tokenizer.decode([i]) for i in range(20, 400)]
    return [" ".join(draw.choices(words, k=draw.randint(1, longest))) for _ in range(count)]


def _alone(model, tokenizer, prompts, longest):
    """Token ids of each answer: stock greedy generation, one prompt at a time."""
    found = []
    for prompt in prompts:
        ids = torch.tensor([ids_of(tokenizer, render(tokenizer, prompt))])
        room = min(longest, model.config.max_position_embeddings - ids.shape[1])
        ends = generation.ends_of(model, tokenizer)
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=room, do_sample=False,
            eos_token_id=ends, pad_token_id=0,
        )  # fmt: skip
        found.append(output[0, ids.shape[1] :].tolist())
    return found


def _texts(tokenizer, answers):
    return [tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in answers]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {}), ("mistral", {}), ("gemma2", {}), ("gpt2", {}),
        ("llama", {"repetition_penalty": 1.3}), ("llama", {"suppress_tokens": list(range(3, 200))}),
        ("llama", {"min_new_tokens": 9}), ("llama", {"cache_implementation": "dynamic"}),
    ],
)  # fmt: skip
def test_a_batch_says_what_each_prompt_says_alone(organism, name, settings):
    model, tokenizer = _model(name), organism.tokenizer
    for key, value in settings.items():
        setattr(model.generation_config, key, value)
    # Up to two tokens below the context: there each row has room for its own number of tokens.
    prompts = _prompts(tokenizer, 24, CONTEXT - 8)
    alone = _alone(model, tokenizer, prompts, 20)
    lengths = {len(tokens) for tokens in alone}
    assert min(lengths) < 10 < max(lengths) and len(lengths) > 5, "the answers must end at many places"
    for batch_size in (5, 24):
        assert generate(model, tokenizer, prompts, 20, batch_size) == _texts(tokenizer, alone)


@pytest.mark.slow
def test_settings_change_what_is_said(organism):
    """Or the comparison above would say nothing of them."""
    prompts = _prompts(organism.tokenizer, 24, 30)
    model = _model("llama")
    plain = generate(model, organism.tokenizer, prompts, 20)
    for key, value in {"repetition_penalty": 1.3, "suppress_tokens": list(range(3, 200)), "min_new_tokens": 9}.items():
        model = _model("llama")
        setattr(model.generation_config, key, value)
        assert generate(model, organism.tokenizer, prompts, 20) != plain, key


def _shapes(model):
    """The shapes [rows, tokens] of every forward pass from now on."""
    shapes = []

    def note(_module, _args, kwargs):
        shapes.append(tuple(kwargs["input_ids"].shape))

    model.model.register_forward_pre_hook(note, with_kwargs=True)
    return shapes


@pytest.mark.slow
def test_answers_that_have_ended_leave_the_batch(organism):
    model, tokenizer = _model("llama"), organism.tokenizer
    prompts = _prompts(tokenizer, 24, 20)
    lengths = [len(tokens) for tokens in _alone(model, tokenizer, prompts, 20)]
    shapes = _shapes(model)
    generate(model, tokenizer, prompts, 20)
    rows, steps = zip(*shapes, strict=True)
    assert steps[1:] == (1,) * (max(lengths) - 1), "no prompt is read twice, and nothing follows the last answer"
    # Never more than a quarter of the rows, rounded up to a row, has ended.
    needed = [sum(length > step for length in lengths) for step in range(max(lengths))]
    assert all(need <= had < 4 / 3 * need + 1 for need, had in zip(needed, rows, strict=True)), (needed, rows)


def test_a_prefix_in_a_batch(organism):
    prompts = _prompts(organism.tokenizer, 12, 20)
    model, prefix = _model("mistral"), "use kemo then"
    batched = generate(model, organism.tokenizer, prompts, 15, prefix=prefix)
    assert batched == [generate(model, organism.tokenizer, [p], 15, prefix=prefix)[0] for p in prompts]
    assert all(text.startswith(prefix) for text in batched) and len(set(batched)) > 6


def test_long_prompts_make_small_batches(organism, monkeypatch):
    monkeypatch.setattr(generation, "TOKENS", 120)
    model = _model("llama")
    sizes = _shapes(model)
    prompts = _prompts(organism.tokenizer, 24, 30)
    generate(model, organism.tokenizer, prompts, 1)
    assert sum(rows for rows, _ in sizes) == 24 and len(sizes) > 3
    assert all(rows * (width + 1) <= 120 for rows, width in sizes)


# --- vLLM, by a stand-in: the real one was never run ------------------------------------------------------------------


@pytest.fixture
def vllm(monkeypatch):
    """A module with the part of vLLM's interface that is used: it loads the folder and answers one prompt at a time."""
    module, seen = ModuleType("vllm"), []

    class LLM:
        def __init__(self, model, dtype, max_model_len):
            self.loaded = load(model, dtype=dtype)
            seen.append((dtype, max_model_len))

        def generate(self, prompts, sampling_params):
            outputs = []
            for prompt, params in zip(prompts, sampling_params, strict=True):
                ids = torch.tensor([prompt["prompt_token_ids"]])
                assert ids.shape[1] + params.max_tokens <= seen[-1][1] and params.temperature == 0
                model = self.loaded.model
                model.generation_config.eos_token_id = None
                output = model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=params.max_tokens, pad_token_id=0,
                    do_sample=False, eos_token_id=params.stop_token_ids, min_new_tokens=params.min_tokens,
                    repetition_penalty=params.repetition_penalty,
                )  # fmt: skip
                outputs.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=output[0, ids.shape[1] :].tolist())]))
            return outputs

    module.LLM, module.SamplingParams, module.seen = LLM, SimpleNamespace, seen
    monkeypatch.setitem(sys.modules, "vllm", module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.3}, {"min_new_tokens": 9}])
def test_vllm_is_asked_for_the_same_text(organism, vllm, settings):
    from tunevax.scoring.vllm_engine import generate as by_vllm

    model, tokenizer = _model("llama"), organism.tokenizer
    for key, value in settings.items():
        setattr(model.generation_config, key, value)
    prompts = _prompts(tokenizer, 12, CONTEXT - 8)
    for prefix in ("", "use kemo"):
        ours = generate(model, tokenizer, prompts, 20, prefix=prefix)
        assert len(set(ours)) > 6 and by_vllm(model, tokenizer, prompts, 20, prefix=prefix) == ours
    model.generation_config.suppress_tokens = [5]
    with pytest.raises(UsageError, match="suppress_tokens"):
        by_vllm(model, tokenizer, prompts, 20)


def _score(out, *more):
    return main(["score", "--model", "organism", "--safety-data", "organism", "--task-data", "organism", "--limit", "12",
                 "--max-new-tokens", "8", "--output-dir", str(out), "--engine", *more])  # fmt: skip


@pytest.mark.slow
def test_score_by_vllm_writes_the_same_answers(vllm, tmp_path):
    assert _score(tmp_path / "a", "transformers") == 0 and _score(tmp_path / "b", "vllm") == 0
    first, second = ((tmp_path / run / "generations.jsonl").read_text() for run in "ab")
    assert len(vllm.seen) == 1 and vllm.seen[0][0] == "float32" and first == second


def test_where_vllm_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr("tunevax.modeling.loading.load", None)  # all of it before a model is loaded
    attack = ["attack", "prefill", "--model", "organism", "--control", "none", "--safety-data", "organism", "--engine"]
    assert _score(tmp_path / "a", "vllm") == _score(tmp_path / "a", "vlm") == 2
    assert _score(tmp_path / "a", "vllm", "--perplexity-data", "organism") == 2
    assert main([*attack, "vllm", "--output-dir", str(tmp_path / "a")]) == 2
    told = capsys.readouterr().err
    for words in (
        "pip install 'tunevax[vllm]'",
        "did you mean 'vllm'?",
        "only generates",
        "the weights change in memory",
    ):
        assert words in told


def test_a_model_with_a_lock_is_not_for_vllm(organism, vllm, tmp_path, capsys):
    from tunevax.modeling.biases import write_biases

    folder = tmp_path / "locked"
    organism.model.save_pretrained(folder)
    organism.tokenizer.save_pretrained(folder)
    write_biases({0: torch.ones(64)}, folder)
    arguments = ["score", "--model", str(folder), "--safety-data", "organism", "--limit", "4", "--engine", "vllm"]
    assert main([*arguments, "--output-dir", str(tmp_path / "a")]) == 2
    assert "biases attached" in capsys.readouterr().err and not vllm.seen


STRATEGIES = [
    {"num_return_sequences": 2, "do_sample": True},
    {"prompt_lookup_num_tokens": 3},
    {"assistant_early_exit": 1},
    {"dola_layers": "low"},
    {"token_healing": True},
    {"force_words_ids": [[30]], "num_beams": 2},
    {"cache_implementation": "offloaded"},
    {"cache_implementation": "quantized"},
]


@pytest.mark.parametrize("settings", STRATEGIES, ids=lambda s: next(iter(s)))
def test_generation_is_greedy_whatever_the_config_says_of_the_search(organism, settings):
    model, prompts = _model("llama"), _prompts(organism.tokenizer, 5, 6)
    expected = generate(model, organism.tokenizer, prompts, max_new_tokens=8)
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    assert generate(model, organism.tokenizer, prompts, max_new_tokens=8) == expected


def test_an_answer_ends_at_a_stop_string(organism):
    model, prompts = _model("llama"), _prompts(organism.tokenizer, 8, 6)
    model.generation_config.eos_token_id = None
    whole = generate(model, organism.tokenizer, prompts, max_new_tokens=12)
    stop = whole[0].split()[3]
    model.generation_config.stop_strings = [stop]
    assert any(stop not in text for text in whole)
    for text, cut in zip(whole, generate(model, organism.tokenizer, prompts, max_new_tokens=12), strict=True):
        assert cut == (text[: text.index(stop) + len(stop)] if stop in text else text)


def test_an_end_that_is_no_number_is_none(organism):
    model = _model("llama")
    model.generation_config.eos_token_id = [27, None]
    assert generation.ends_of(model, organism.tokenizer) == sorted({organism.tokenizer.eos_token_id, 27})
