"""Tokens per second of `tunevax.scoring.generation.generate` against one prompt at a time; whether the text is equal.

    python benchmarks/generation.py [--rounds 3] [--prompts 200] [--batch-size 128] [--threads 2] [--only NAME] [--vllm]

Both in one process, taking turns. One prompt at a time is the loop that one writes without thinking: `model.generate`,
greedy, with a key-value cache and the same ends. The prompts have 8 to 120 tokens, the answers 1 token to the longest
allowed. The organism is asked as it is; the random Llamas have one word in 60 as an end, so that greedy answers stop at
mixed lengths or never. `--vllm` adds `--engine vllm`, the start of its engine included; the organism's heads are too
small for vLLM on a CPU. `wall` and `cpu` are ratios of the loop to `generate`, the medians over the rounds, the second
in processor time of all threads, for a machine that others use too.
"""

import argparse
import json
import os
import random
import statistics
import time

from tunevax.data.chat import render

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tunevax.data import load_safety, load_task
from tunevax.data.encoding import ids_of
from tunevax.modeling import load
from tunevax.scoring.generation import ends_of, generate
from tunevax.scoring.vllm_engine import generate as by_vllm

VOCABULARY = 8000


def random_llama(blocks: int, hidden: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=blocks,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128, max_position_embeddings=512,
        initializer_range=0.1, attn_implementation="sdpa", tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = list(range(2, VOCABULARY, 60))
    return model


def words() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are numbers."""
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 2, **{str(i): i for i in range(3, VOCABULARY)}}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    found = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")
    found.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    return found


def cases(count: int) -> dict[str, tuple]:
    """Name to model, tokenizer, prompts and the longest answer."""
    draw = random.Random(0)
    sources = [load_safety("organism", split) for split in ("evaluation", "attack", "alignment")]
    asked = [row["prompt"] for rows in (*sources, load_task("organism", "train").rows) for row in rows]
    organism, tokenizer, _ = load("organism", device="cpu")
    # Several questions in a row where they are to be longer; each has 8 tokens or so, and the context is 128.
    several = [" ".join(draw.sample(asked, draw.choice((1, 1, 1, 2, 3, 4, 6, 8, 10)))) for _ in range(count)]
    numbers = [" ".join(str(draw.randrange(3, VOCABULARY)) for _ in range(draw.randint(8, 120))) for _ in range(count)]
    return {
        "organism": (organism, tokenizer, several, 24),
        "llama, 4 blocks of 256": (random_llama(4, 256), words(), numbers, 128),
        "llama, 8 blocks of 512": (random_llama(8, 512), words(), numbers, 128),
    }


def one_at_a_time(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list, longest: int
) -> list[str]:
    found, context = [], model.config.max_position_embeddings
    for prompt in prompts:
        ids = torch.tensor([ids_of(tokenizer, render(tokenizer, prompt))], device=model.device)
        width = ids.shape[1]
        with torch.inference_mode():
            output = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=min(longest, context - width),
                do_sample=False, eos_token_id=ends_of(model, tokenizer), pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
        found.append(tokenizer.decode(output[0, width:], skip_special_tokens=True).strip())
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--only", default="")
    parser.add_argument("--vllm", action="store_true")
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    rows = []
    print(
        f"torch {torch.__version__}, {options.threads} threads, {options.prompts} prompts, batches of "
        f"{options.batch_size}, {options.rounds} rounds, {options.dtype}"
    )
    print(f"{'':26} {'one at a time':>14} {'generate':>10} {'wall':>6} {'cpu':>6}  texts that differ, answer lengths")
    for name, (model, tokenizer, prompts, longest) in cases(options.prompts).items():
        if options.only not in name:
            continue
        model.to(device=options.device, dtype=getattr(torch, options.dtype))
        ways = {
            "one": lambda m=model, t=tokenizer, p=prompts, n=longest: one_at_a_time(m, t, p, n),
            "batched": lambda m=model, t=tokenizer, p=prompts, n=longest: generate(m, t, p, n, options.batch_size),
        }
        if options.vllm:
            ways["vllm"] = lambda m=model, t=tokenizer, p=prompts, n=longest: by_vllm(m, t, p, n)
        wall: dict[str, list[float]] = {way: [] for way in ways}
        cpu: dict[str, list[float]] = {way: [] for way in ways}
        texts: dict[str, list[str]] = {}
        for way in ways:
            ways[way]() if options.device != "cpu" else None  # kernels compiled and loaded
        for _ in range(options.rounds):
            for way, run in ways.items():
                start, spent = time.perf_counter(), time.process_time()
                texts[way] = run()
                wall[way].append(time.perf_counter() - start)
                cpu[way].append(time.process_time() - spent)
        lengths = [len(ids_of(tokenizer, text)) for text in texts["one"]]
        row = {
            "model": name, "prompts": len(prompts),
            "prompt_tokens": sum(len(ids_of(tokenizer, render(tokenizer, p))) for p in prompts),
            "answer_tokens": sum(lengths), "shortest": min(lengths), "median": statistics.median(lengths),
            "longest": max(lengths), "differ": sum(a != b for a, b in zip(texts["one"], texts["batched"], strict=True)),
            "wall_ratio": statistics.median(a / b for a, b in zip(wall["one"], wall["batched"], strict=True)),
            "cpu_ratio": statistics.median(a / b for a, b in zip(cpu["one"], cpu["batched"], strict=True)),
            "tokens_per_second": {way: sum(lengths) / statistics.median(wall[way]) for way in ways},
            "seconds": wall, "cpu_seconds": cpu,
        }  # fmt: skip
        rows.append(row)
        one, batched, *vllm = row["tokens_per_second"].values()
        print(
            f"{name:26} {one:8.0f} tok/s {batched:4.0f} tok/s {row['wall_ratio']:6.1f} {row['cpu_ratio']:6.1f}  "
            f"{row['differ']} of {len(prompts)}, {row['shortest']} to {row['longest']}, median {row['median']:g}"
        )
        if vllm:
            differ = sum(a != b for a, b in zip(texts["batched"], texts["vllm"], strict=True))
            print(f"{'':26} vllm {vllm[0]:4.0f} tok/s, {differ} of {len(prompts)} texts differ from generate's")
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"torch": torch.__version__, **vars(options), "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
