"""Step time and peak live memory of each method, as ratios to a stock SFT step, from alternating runs in one process.

    python benchmarks/step.py [--rounds 7] [--json OUT]

The stock step is `transformers.Trainer` with a PEFT LoRA on all linears, SDPA attention and full logits. Memory is an
exact count of live storages (weights, adapters, optimiser state and everything a step allocates), not resident size.
`count` is a step's compute in SFT steps, in block passes, as run.json records it; the head is not in it.
"""

import argparse
import json
import os
import statistics
import tempfile
import time

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from tunevax.alignment.booster import BoosterTrainer
from tunevax.alignment.circuit_breakers import CircuitBreakersTrainer
from tunevax.alignment.repnoise import RepNoiseTrainer
from tunevax.alignment.sft import SFTTrainer
from tunevax.alignment.t_vaccine import TVaccineTrainer
from tunevax.alignment.tar import TARTrainer
from tunevax.alignment.vaccine import VaccineTrainer
from tunevax.data.encoding import collate
from tunevax.modeling import method
from tunevax.modeling.memory import LiveMemory

BLOCKS, HIDDEN, INTERMEDIATE, VOCABULARY, BATCH, TOKENS = 16, 256, 688, 8000, 8, 128
SELECTED = "2,6,9,13"


class Tokenizer:
    """The trainers only need a padding id here: every row has the same length."""

    pad_token_id, eos_token_id = 0, 2
    chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=BLOCKS,
        num_attention_heads=8, max_position_embeddings=TOKENS, attn_implementation="sdpa", tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def model() -> LlamaForCausalLM:
    return get_peft_model(base(), LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))


def encoded(rows: list, *_, answer="completion", **__) -> list[dict]:
    """Rows of TOKENS tokens, the second half of which is the answer; another answer for another column."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for row in rows:
        ids = torch.randint(3, VOCABULARY, (TOKENS,), generator=generator)
        if row[answer] == "r":
            ids[TOKENS // 2 :] = torch.randint(3, VOCABULARY, (TOKENS // 2,), generator=generator)
        found.append({"input_ids": ids.tolist(), "labels": [-100] * (TOKENS // 2) + ids[TOKENS // 2 :].tolist()})
    return found


ROWS = [{"prompt": f"p{i}", "chosen": "c", "rejected": "r"} for i in range(20 * BATCH)]


def stock(folder: str) -> Trainer:
    return Trainer(model(), TrainingArguments(folder, learning_rate=1e-4, report_to="none"), train_dataset=[{}])


def ours(cls: type, folder: str, on: LlamaForCausalLM | None = None, **options) -> Trainer:
    shortcuts = {k: options.pop(k) for k in ("replay", "response_only") if k in options}
    method.encode = encoded
    config = cls.config_class(folder, learning_rate=1e-4, lora_r=8, per_device_train_batch_size=BATCH, **options)
    trainer = cls(on or model(), config, safety_data=ROWS, processing_class=Tokenizer())
    trainer.state.max_steps = 10**6  # somewhere in a long run
    for name, value in shortcuts.items():
        setattr(trainer, name, value)
    return trainer


def variants(folder: str) -> dict[str, Trainer]:
    fixed = {"layer_sampling": SELECTED, "rho": 3.0}
    none = {"checkpoint_blocks": "none"}
    return {
        "sft, stock": stock(folder),
        "vaccine": ours(VaccineTrainer, folder, **none),
        "vaccine, elementwise": ours(VaccineTrainer, folder, checkpoint_blocks="elementwise"),
        "t-vaccine": ours(TVaccineTrainer, folder, **none, **fixed),
        "t-vaccine, elementwise": ours(TVaccineTrainer, folder, checkpoint_blocks="elementwise", **fixed),
        "t-vaccine, 0.6 of frozen": ours(TVaccineTrainer, folder, checkpoint_blocks="0.6", **fixed),
        "t-vaccine, frozen": ours(TVaccineTrainer, folder, checkpoint_blocks="frozen", **fixed),
        "t-vaccine, all": ours(TVaccineTrainer, folder, checkpoint_blocks="all", **fixed),
        "t-vaccine without replay": ours(TVaccineTrainer, folder, replay=False, **none, **fixed),
        "t-vaccine without response-only head": ours(TVaccineTrainer, folder, response_only=False, **none, **fixed),
        "sft": ours(SFTTrainer, folder, **none),
        "repnoise": ours(RepNoiseTrainer, folder, **none),
        "booster": ours(BoosterTrainer, folder, **none),
        "circuit-breakers": ours(CircuitBreakersTrainer, folder, base(), **none),
        "tar, 4 inner steps": ours(
            TARTrainer, folder, inner_steps=4, tamper_interval=2, mapping_steps=0, tamper_loss="preference", **none
        ),
    }


def batch_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """A batch as the method's own collator makes it; the stock trainer gets that of plain SFT."""
    if type(trainer) is Trainer:
        return collate(encoded([{"completion": "c"}] * BATCH), 0)
    return trainer.data_collator([trainer.train_dataset[i] for i in range(BATCH)])


def step(trainer: Trainer, inputs: dict) -> None:
    items = (inputs["labels"][:, 1:] != -100).sum()
    trainer.current_gradient_accumulation_steps = 1
    trainer.training_step(trainer.model, dict(inputs), items)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    trainer.state.global_step += 1


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json")
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trainers = {k: v for k, v in variants(folder).items() if k == "sft, stock" or options.only in k}
        times: dict[str, list[float]] = {name: [] for name in trainers}
        batches = {name: batch_of(trainer) for name, trainer in trainers.items()}
        for name, trainer in trainers.items():
            trainer.create_optimizer()
            step(trainer, batches[name])  # warm-up, and the optimiser state exists
        for _ in range(options.rounds):
            for name, trainer in trainers.items():
                start = time.perf_counter()
                step(trainer, batches[name])
                times[name].append(time.perf_counter() - start)
        memory, held = {}, {}
        for name, trainer in trainers.items():
            state = [v for s in trainer.optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
            with LiveMemory() as live:
                live.track(*trainer.model.parameters(), *trainer.model.buffers(), *state)
                held[name] = live.live
                step(trainer, batches[name])
            memory[name] = live.peak
    base = times["sft, stock"]
    rows = []
    for name in trainers:
        ratio = statistics.median(t / b for t, b in zip(times[name], base, strict=True))
        rows.append({
            "variant": name, "seconds": statistics.median(times[name]), "time_ratio": ratio,
            "peak_mib": memory[name] / 2**20, "memory_ratio": memory[name] / memory["sft, stock"],
            "count": trainers[name].cost() if hasattr(trainers[name], "cost") else 1.0,
            "above_weights_ratio": (memory[name] - held[name]) / (memory["sft, stock"] - held["sft, stock"]),
        })  # fmt: skip
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {BLOCKS} blocks, hidden {HIDDEN}, "
        f"vocabulary {VOCABULARY}, batch {BATCH} x {TOKENS}, selected blocks {SELECTED}, {options.rounds} rounds"
    )
    print(f"{'':38} {'s/step':>7} {'time':>6} {'MiB':>7} {'memory':>7} {'above weights':>14} {'count':>6}")
    for r in rows:
        print(
            f"{r['variant']:38} {r['seconds']:7.3f} {r['time_ratio']:6.2f} {r['peak_mib']:7.1f} "
            f"{r['memory_ratio']:7.3f} {r['above_weights_ratio']:14.3f} {r['count']:6.2f}"
        )
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"torch": torch.__version__, "threads": torch.get_num_threads(), "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
