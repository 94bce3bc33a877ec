"""Seconds to put a safety lock on a model, and to extract one, from alternating runs in one process.

    python benchmarks/lock.py [--rounds 7] [--small] [--json OUT]

Applying: a random Llama of 1.2 billion parameters in bf16 with 24 heads locked in 12 blocks, and the organism with 6.
`apply` adds to the biases of the model in memory, `biases` is the run form's share of the work, `stock form` asks what
a stock checkpoint can hold, of a model that has no such biases yet; loading and saving are in none of them. `products`
are the same output projections, each called once on delta and zeros.
Extracting: 100 pairs of the organism, beside plain forward passes over the same answers, tokenised each time too;
neither computes logits.
"""

import argparse
import json
import os
import statistics
import time
from copy import deepcopy

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tunevax.data.encoding import collate
from tunevax.data.safety import load_safety
from tunevax.modeling.blocks import find_blocks
from tunevax.modeling.loading import load
from tunevax.modeling.loss import last_hidden
from tunevax.restoration.extract import ExtractLock, answers, measure
from tunevax.restoration.lock import SafetyLock, apply, lock_biases
from tunevax.restoration.safetylock import make_stock, stock_form


def billion(small: bool) -> LlamaForCausalLM:
    """The shape of Llama-3.2-1B; `small` has two blocks of it."""
    config = LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=2 if small else 16,
        num_attention_heads=32, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True, dtype=torch.bfloat16,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    return model


def random_lock(model: torch.nn.Module, heads: int, blocks: int) -> SafetyLock:
    config = model.config
    generator = torch.Generator().manual_seed(0)
    layer = torch.arange(heads) % min(blocks, config.num_hidden_layers)
    head = torch.arange(heads) // min(blocks, config.num_hidden_layers)
    u = torch.nn.functional.normalize(torch.randn(heads, config.head_dim, generator=generator), dim=1)
    return SafetyLock(u, torch.full((heads,), 0.4), layer, head, {"head_dim": config.head_dim})


@torch.no_grad()
def products(model: torch.nn.Module, lock: SafetyLock) -> None:
    blocks = find_blocks(model)
    for layer in lock.layer.unique().tolist():
        module = blocks[layer].o_proj
        module(torch.ones(2, module.in_features, dtype=model.dtype))


def alternate(variants: dict, rounds: int) -> dict[str, dict[str, float]]:
    """Of each the median over rounds, after one to warm up: seconds by the clock, and of this process's CPU time."""
    times = {name: [] for name in variants}
    for i in range(rounds + 1):
        for name, run in variants.items():
            start, cpu = time.perf_counter(), time.process_time()
            run()
            if i:
                times[name].append((time.perf_counter() - start, time.process_time() - cpu))
    return {
        name: {"wall": statistics.median(w for w, _ in found), "cpu": statistics.median(c for _, c in found)}
        for name, found in times.items()
    }


def applying(small: bool, rounds: int) -> list[dict]:
    models = {"organism": (load("organism").model, 6, 8), "llama": (billion(small), 24, 12)}
    rows = []
    for name, (model, heads, blocks) in models.items():
        lock = random_lock(model, heads, blocks)
        parameters = sum(p.numel() for p in model.parameters())
        bare = deepcopy(model.config)
        form = stock_form(model)
        extra = make_stock(model, form)
        with torch.device("meta"):
            unlocked = type(model)(bare)
        variants = {
            "apply": lambda m=model, k=lock: apply(m, k, 6.0),
            "biases": lambda m=model, k=lock: lock_biases(m, k, 6.0),
            "products": lambda m=model, k=lock: products(m, k),
            "stock form": lambda m=unlocked: stock_form(m),
        }
        rows.append({
            "model": name, "parameters": parameters, "heads": heads, "blocks": len(lock.layer.unique()),
            "bytes added, stock": extra, "seconds": alternate(variants, rounds),
        })  # fmt: skip
    return rows


def extracting(rounds: int) -> dict:
    loaded = load("organism")
    pairs = load_safety("organism", "alignment", ("chosen", "rejected"))[:100]
    config = ExtractLock(heads=6)

    @torch.no_grad()
    def forwards(passes: int) -> None:
        rows = answers(loaded.model, loaded.tokenizer, pairs, config)
        rows.sort(key=lambda row: len(row["input_ids"]))
        for _ in range(passes):
            for i in range(0, len(rows), config.batch_size):
                batch = collate(rows[i : i + config.batch_size], loaded.tokenizer.pad_token_id)
                batch.pop("labels")
                last_hidden(loaded.model, batch)

    probing = ExtractLock(heads=6, probe="official")
    times = alternate(
        {
            "extract": lambda: measure(loaded.model, loaded.tokenizer, pairs, config),
            "extract, official probe": lambda: measure(loaded.model, loaded.tokenizer, pairs, probing),
            "one forward pass": lambda: forwards(1),
            "two forward passes": lambda: forwards(2),
        },
        rounds,
    )
    return {"pairs": len(pairs), "seconds": times}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--small", action="store_true", help="two blocks in place of sixteen")
    parser.add_argument("--json")
    options = parser.parse_args()
    rows, extraction = applying(options.small, options.rounds), extracting(options.rounds)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.rounds} rounds, medians in seconds")
    for row in [*rows, {"model": "organism, extraction", **extraction}]:
        print(", ".join(f"{k} {v}" for k, v in row.items() if k != "seconds"))
        for name, found in row["seconds"].items():
            print(f"    {name:24} wall {found['wall']:.4f}  cpu {found['cpu']:.4f}")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(
                {"torch": torch.__version__, "threads": torch.get_num_threads(), "apply": rows, "extract": extraction},
                file,
                indent=1,
            )


if __name__ == "__main__":
    main()
