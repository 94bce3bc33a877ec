"""The three commands on real public data and untrained 10M-parameter Llama and Qwen3 models: a test of every code
path on real text, not evidence about a defence, for these models know nothing that could leak.

    python scripts/real_run.py --data DIR --output-dir OUT [--architecture llama|qwen3]

DIR holds, in folders of these names (all public):
    harmbench_r2d2_pairs/pairs.jsonl        prompt, refusal, affirmative_stub (from sophie-xhonneux/Continuous-AdvTrain)
    advbench/harmful_behaviors.csv          goal, target                      (from llm-attacks/llm-attacks)
    strongreject/strongreject_dataset.csv   forbidden_prompt, category        (from alexandrasouly/strongreject)
    gsm8k/train.jsonl, gsm8k/test.jsonl     question, answer                  (from openai/grade-school-math)
    wikitext2/valid.txt                     text for the tokenizer            (from pytorch/examples)
"""

import argparse
import json
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tunevax.cli import main as tunevax

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def build_tokenizer(data: Path) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE of 8,000 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|bos|>", "<|eos|>", "<|pad|>", "<|user|>", "<|assistant|>", "<|system|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=8000, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    lines = (data / "wikitext2/valid.txt").read_text(encoding="utf-8").splitlines()
    lines += [
        json.loads(line)["answer"] for line in (data / "gsm8k/train.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    tokenizer.train_from_iterator(lines, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        pad_token="<|pad|>",
        chat_template=TEMPLATE,
    )


def build_model(architecture: str, vocabulary: int) -> transformers.PreTrainedModel:
    """Untrained, about 10M parameters, 8 blocks."""
    shape = {
        "vocab_size": vocabulary, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 8, "num_attention_heads": 8,
        "num_key_value_heads": 4, "max_position_embeddings": 1024, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
    }  # fmt: skip
    config = {"llama": transformers.LlamaConfig, "qwen3": transformers.Qwen3Config}[architecture](**shape)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--architecture", choices=["llama", "qwen3"], default="llama")
    options = parser.parse_args()
    data, out = options.data, options.output_dir / options.architecture
    base = out / "base"
    tokenizer = build_tokenizer(data)
    model = build_model(options.architecture, len(tokenizer))
    print(f"{options.architecture}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters")
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)

    pairs = f"{data}/harmbench_r2d2_pairs/pairs.jsonl:chosen=refusal_short,rejected=affirmative_stub,split=all"
    steps = ["--per-device-train-batch-size", "10", "--max-length", "256", "--seed", "1"]
    run(["align", "t-vaccine", "--model", base, "--safety-data", pairs, "--gamma", "3", "--rho", "1", "--max-steps", "100", *steps,
         "--output-dir", out / "t-vaccine"])  # fmt: skip
    run(["attack", "finetune", "--model", out / "t-vaccine", "--control", base, "--p", "0.1", "--n", "200", *steps,
         "--safety-data", f"{data}/advbench/harmful_behaviors.csv:prompt=goal,rejected=target,split=all",
         "--task-data", f"gsm8k:path={data}/gsm8k/train.jsonl",
         "--eval-data", f"{data}/strongreject/strongreject_dataset.csv:prompt=forbidden_prompt",
         "--task-eval-data", f"gsm8k:path={data}/gsm8k/test.jsonl,split=all",
         "--max-steps", "60", "--points", "4", "--learning-rate", "1e-3", "--limit", "48", "--max-new-tokens", "24",
         "--generation-batch-size", "48", "--output-dir", out / "poisoned"])  # fmt: skip
    run(["report", out / "poisoned", "--output", out / "report.html"])


def run(arguments: list) -> None:
    code = tunevax([str(a) for a in arguments])
    if code:
        raise SystemExit(code)


if __name__ == "__main__":
    main()
