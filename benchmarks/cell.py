"""An audit cell on a real model (load, attack, score on the way) against a pipeline that one writes without thinking.

    make real; pip install trl
    python benchmarks/cell.py --model RUN --known FILE [--rounds 2] [--threads 1] [--json FILE]

Both do the same work in one process, taking turns: an aligned SmolLM2 is loaded, fine-tuned with LoRA on the same
harmful rows of a proxy topic for the same steps in the same batches, and its answers to the same prompts are judged by
the same judge before and at each of the evaluated steps. The plain pipeline is TRL's `SFTTrainer` on the merged model
in fp32, a saved checkpoint per evaluated step, each loaded again, and `model.generate` for one prompt at a time. Times
are processor seconds of all threads, for a machine that others use too. tunevax reads the GGUF file in its first round.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch

from tunevax import proxy
from tunevax.attacks.context import AttackContext, TargetOptions
from tunevax.attacks.finetune import FinetuneConfig, log_spaced
from tunevax.data import load_safety
from tunevax.data.mixing import harmful_rows, mix
from tunevax.modeling import load
from tunevax.quiet import quiet
from tunevax.scoring.judges import load_judges
from tunevax.scoring.suite import Suite

STEPS, POINTS, BATCH, LENGTH, PROMPTS, TOKENS, RATE = 24, 4, 8, 96, 48, 16, 5e-4


def ours(ref: str, attack: list, prompts: list, kept: dict) -> list[float]:
    """The cell of an audit."""
    with tempfile.TemporaryDirectory() as scratch:
        config = FinetuneConfig(
            scratch, learning_rate=RATE, p=1.0, n=len(attack), max_steps=STEPS, points=POINTS, max_length=LENGTH,
            per_device_train_batch_size=BATCH, lr_scheduler_type="constant", warmup_steps=0,
            checkpoint_blocks="none", seed=1,
        )  # fmt: skip
        suite = Suite(prompts, load_judges(["proxy"]), max_new_tokens=TOKENS)
        target = {"label": "m", "role": "model", "ref": ref}
        context = AttackContext(
            target, TargetOptions(), attack, [], suite, {"kind": "finetune", "attack": "a", "seed": 1}, kept=kept
        )
        config.run(context)
        return [row["scores"]["harmful/proxy"]["value"] for row in context.results]


def plain(merged: str, attack: list, prompts: list) -> list[float]:
    """The same work with TRL and transformers alone."""
    import transformers
    from datasets import Dataset
    from peft import LoraConfig, PeftModel
    from trl import SFTConfig, SFTTrainer

    judge = load_judges(["proxy"])["proxy"]
    rows = mix([], harmful_rows(attack), 1.0, len(attack), 1)
    chats = [{"prompt": [{"role": "user", "content": r["prompt"]}],
              "completion": [{"role": "assistant", "content": r["completion"]}]} for r in rows]  # fmt: skip
    base = transformers.AutoModelForCausalLM.from_pretrained(merged)
    tokenizer = transformers.AutoTokenizer.from_pretrained(merged)
    shares = []

    def score(model: torch.nn.Module) -> None:
        answers = []
        for row in prompts:
            chat = [{"role": "user", "content": row["prompt"]}]
            ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
            out = model.generate(**ids, max_new_tokens=TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id)
            answers.append(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
        verdicts = judge([row["prompt"] for row in prompts], answers)
        shares.append(sum(v.harmful for v in verdicts) / len(verdicts))

    score(base)
    with tempfile.TemporaryDirectory() as folder:
        points = sorted(log_spaced(STEPS, POINTS))
        config = SFTConfig(
            folder, max_steps=STEPS, per_device_train_batch_size=BATCH, learning_rate=RATE, seed=1, max_length=LENGTH,
            lr_scheduler_type="constant", save_strategy="steps", save_steps=1, save_only_model=True, use_cpu=True,
            report_to="none", disable_tqdm=True, bf16=False, gradient_checkpointing=False,
        )  # fmt: skip
        lora = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
        trainer = SFTTrainer(
            base, config, train_dataset=Dataset.from_list(chats), processing_class=tokenizer, peft_config=lora
        )
        trainer.train()
        for step in points:
            again = transformers.AutoModelForCausalLM.from_pretrained(merged)
            score(PeftModel.from_pretrained(again, f"{folder}/checkpoint-{step}").merge_and_unload().eval())
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", required=True, help="an aligned run on SmolLM2, such as OUT/sft-1 of scripts/real_study.py"
    )
    parser.add_argument("--known", required=True, help="known.json of the same study")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    quiet()
    torch.set_num_threads(options.threads)
    source = f"{proxy.PREFIX}geography:known={options.known}"
    attack = load_safety(source, "attack", ("rejected",))[: STEPS * BATCH]
    prompts = load_safety(source, "evaluation")[:PROMPTS]
    kept: dict = {}
    merged = tempfile.mkdtemp()
    model, tokenizer, _ = load(options.model, dtype="float32")
    model.save_pretrained(merged)
    tokenizer.save_pretrained(merged)
    del model
    seconds: dict[str, list[float]] = {"plain": [], "tunevax": []}
    shares: dict[str, list[float]] = {}
    for _ in range(options.rounds):
        for name, run in (("plain", lambda: plain(merged, attack, prompts)),
                          ("tunevax", lambda: ours(options.model, attack, prompts, kept))):  # fmt: skip
            start = time.process_time()
            shares[name] = run()
            seconds[name].append(time.process_time() - start)
            print(f"{name}: {seconds[name][-1]:.0f} s of processor time, harmful {shares[name]}", flush=True)
    ratio = statistics.median(seconds["plain"]) / statistics.median(seconds["tunevax"])
    print(f"cells per hour: {ratio:.1f} times those of the plain pipeline")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "seconds": seconds,
            "harmful": shares,
            "ratio": ratio,
            "torch": torch.__version__,
            "threads": options.threads,
        }
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
