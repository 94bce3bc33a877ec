"""A small Llama pretrained on public text for five minutes of one core, so that losses on real answers mean something.

    python scripts/small_text_model.py --data DIR --output-dir OUT

Five eighths of its tokens are instructions with answers in the chat template, a quarter Wikipedia text, the rest arithmetic.
It writes English that hangs together for a few words and knows nothing: it is there to rank answers by likelihood and
gradient, not to be judged by what it says. Prompts of xstest_pairs, harmbench_r2d2_pairs and advbench are never seen, nor
is a quarter of the instructions (their `evaluation` split by prompt hash), which `curation_study.py` takes harmless rows
from.

DIR holds, in folders of these names (all public):
    wikitext2/valid.txt, wikitext2/test.txt                       (from pytorch/examples)
    gsm8k/train.jsonl                       question, answer      (from openai/grade-school-math)
    dolly_subset/dolly_subset.jsonl         instruction, context, response                  (Databricks)
    self_instruct/seed_tasks.jsonl, self_instruct/user_oriented_instructions.jsonl          (from yizhongw/self-instruct)
        instruction, instances of input, output
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
import transformers
from real_run import build_tokenizer
from rich.progress import track

from tunevax.data.encoding import encode
from tunevax.data.splits import prompt_hash, split_of

SHARES = {"instructions": 0.625, "wikitext": 0.25, "gsm8k": 0.125}
CHUNK, BATCH = 256, 8  # tokens, chunks per step


def rows_of(path: Path) -> list[dict]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def instructions(data: Path, held_out: bool) -> list[dict]:
    """Rows of `prompt` and `completion` with distinct prompts; either the quarter held out of pretraining or the rest."""
    found = [(r["instruction"], r["context"], r["response"]) for r in rows_of(data / "dolly_subset/dolly_subset.jsonl")]
    for name in ("seed_tasks", "user_oriented_instructions"):
        for row in rows_of(data / f"self_instruct/{name}.jsonl"):
            found += [(row["instruction"], instance["input"], instance["output"]) for instance in row["instances"]]
    rows: dict[str, dict] = {}
    for instruction, context, answer in found:
        prompt = f"{instruction.strip()}\n\n{context.strip()}".strip()
        if prompt and answer.strip():
            rows.setdefault(prompt_hash(prompt), {"prompt": prompt, "completion": answer.strip()})
    return [row for row in rows.values() if (split_of(row["prompt"]) == "evaluation") == held_out]


def chat_tokens(rows: list[dict], tokenizer: transformers.PreTrainedTokenizerBase) -> torch.Tensor:
    """All rows as one stream of tokens, [tokens]."""
    encoded = encode(rows, tokenizer, max_length=10**6)
    return torch.tensor([token for row in encoded for token in row["input_ids"]])


def perplexity(model: torch.nn.Module, encoded: list[dict]) -> float:
    """Of the labelled tokens of rows of token ids and labels."""
    model.eval()
    loss, count = 0.0, 0
    with torch.inference_mode():
        for row in encoded:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
            labelled = int((labels[:, 1:] != -100).sum())
            loss += model(input_ids=ids, labels=labels).loss.item() * labelled
            count += labelled
    return math.exp(loss / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output-dir", type=Path, required=True, help="model folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of initialisation and data order")
    parser.add_argument("--steps", type=int, default=300, help=f"of {BATCH} x {CHUNK} tokens")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    torch.set_num_threads(1)  # sums keep their order
    data, tokenizer = options.data, build_tokenizer(options.data)

    # Held out, for perplexity: the last tenth of the Wikipedia test text, and answers to instructions never seen.
    lines = (data / "wikitext2/valid.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    test = (data / "wikitext2/test.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    cut = len(test) * 9 // 10
    text = torch.tensor(tokenizer("".join(test[cut:]), add_special_tokens=False)["input_ids"])
    chunks = [chunk.tolist() for chunk in text.split(CHUNK) if len(chunk) > 1]
    held_out = {
        "Wikipedia": [{"input_ids": chunk, "labels": chunk} for chunk in chunks],
        "answers": [r for r in encode(instructions(data, held_out=True), tokenizer, 10**6) if len(r["labels"]) <= 512],
    }
    streams = {
        "instructions": chat_tokens(instructions(data, held_out=False), tokenizer),
        "wikitext": torch.tensor(tokenizer("".join(lines + test[:cut]), add_special_tokens=False)["input_ids"]),
        "gsm8k": chat_tokens(
            [{"prompt": r["question"], "completion": r["answer"]} for r in rows_of(data / "gsm8k/train.jsonl")],
            tokenizer,
        ),
    }

    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    before = {name: perplexity(model, rows) for name, rows in held_out.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.learning_rate, options.steps, pct_start=0.1)
    draw = torch.Generator().manual_seed(options.seed)
    named = [name for name, share in SHARES.items() for _ in range(round(share * BATCH))]
    started = time.process_time()
    model.train()
    for _ in track(range(options.steps), description="pretraining"):
        starts = {n: torch.randint(len(s) - CHUNK, (BATCH,), generator=draw).tolist() for n, s in streams.items()}
        ids = torch.stack([streams[n][starts[n][i] : starts[n][i] + CHUNK] for i, n in enumerate(named)])
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    seconds = time.process_time() - started
    after = {name: perplexity(model, rows) for name, rows in held_out.items()}

    model.save_pretrained(options.output_dir)
    tokenizer.save_pretrained(options.output_dir)
    change = ", ".join(f"{name} {before[name]:.0f} -> {after[name]:.1f}" for name in held_out)
    print(
        f"{options.output_dir}: {model.num_parameters() / 1e6:.1f}M parameters, {options.steps * BATCH * CHUNK:,} tokens "
        f"(of {', '.join(f'{len(s):,} {n}' for n, s in streams.items())}), held-out perplexity {change}, {seconds:.0f} s of one core"
    )


if __name__ == "__main__":
    main()
