"""Step time and peak live memory of Surgery, both ways to the sink attention, as ratios to fine-tuning without it.

    python benchmarks/sink.py [--rounds 3] [--tokens 512 2048] [--only NAME] [--json OUT]

All in one process, the variants taking turns. A step has 10 rows of the job, as in the paper, and two pairs, four rows
of the same length. The model is a random Llama with SDPA attention and LoRA on all linears, small, so that it runs in
minutes. The share of attention in a step grows with tokens over width, so the sink costs more here than in a model
worth defending. Memory is an exact count of live storages (weights, adapters, optimiser state and everything a step
allocates), not resident size. `cpu` is the ratio of processor time, for a machine that others use too.
`pairs, no sink` runs the pairs through the model and back without reading any attention: what is above it is the sink.
"""

import argparse
import json
import statistics
import tempfile
import time
from contextlib import contextmanager

import torch
from step import Tokenizer, step
from transformers import LlamaConfig, LlamaForCausalLM

from tunevax.finetuning import sft, surgery
from tunevax.modeling import method
from tunevax.modeling.loss import last_hidden
from tunevax.modeling.memory import LiveMemory

BLOCKS, HIDDEN, INTERMEDIATE, HEADS, KEY_HEADS, VOCABULARY, BATCH, PAIRS = 3, 256, 688, 4, 2, 4000, 10, 2


def model(tokens: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS, max_position_embeddings=tokens,
        attn_implementation="sdpa", tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def trainers(tokens: int, folder: str) -> dict[str, sft.FinetuneTrainer]:
    def encoded(rows: list, *_, answer="completion", **__) -> list[dict]:
        """Rows of `tokens` tokens, the second half of which is the answer."""
        generator, found = torch.Generator().manual_seed(1), []
        for row in rows:
            ids = torch.randint(3, VOCABULARY, (tokens,), generator=generator)
            if row[answer] == "r":
                ids[tokens // 2 :] = torch.randint(3, VOCABULARY, (tokens // 2,), generator=generator)
            found.append({"input_ids": ids.tolist(), "labels": [-100] * (tokens // 2) + ids[tokens // 2 :].tolist()})
        return found

    method.encode = encoded
    job = [{"prompt": f"p{i}", "completion": "c"} for i in range(BATCH)]
    safety = [{"prompt": f"q{i}", "chosen": "c", "rejected": "r"} for i in range(2 * PAIRS)]

    def build(cls: type, **options) -> sft.FinetuneTrainer:
        config = cls.config_class(folder, per_device_train_batch_size=BATCH, checkpoint_blocks="none", **options)
        config.max_length = tokens
        trainer = cls(model(tokens), config, safety_data=safety, task_data=job, processing_class=Tokenizer())
        trainer.state.max_steps = 10**6  # somewhere in a long run
        return trainer

    return {
        "sft": build(sft.FinetuneTrainer),
        "pairs, no sink": build(PairsOnly, pairs_per_step=PAIRS),
        "surgery, linear": build(surgery.SurgeryTrainer, pairs_per_step=PAIRS),
        "surgery, eager": build(surgery.SurgeryTrainer, pairs_per_step=PAIRS, sink_attention="eager"),
    }


class PairsOnly(surgery.SurgeryTrainer):
    """Surgery with the head's input in place of sink values."""

    def require_queries_and_keys(self) -> None:
        pass

    def add_sink_gradient(self) -> None:
        stock = surgery.sink_columns
        surgery.sink_columns = self.hidden
        try:
            super().add_sink_gradient()
        finally:
            surgery.sink_columns = stock

    @staticmethod
    @contextmanager
    def hidden(model, inputs, how, sink, queries):
        yield last_hidden(model, {"input_ids": inputs["input_ids"]}).mean(1)[:, None]


def measure(tokens: int, rounds: int, only: str) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        each = {k: v for k, v in trainers(tokens, folder).items() if k == "sft" or only in k}
        times, cpu = ({name: [] for name in each} for _ in range(2))
        batch = each["sft"].data_collator(each["sft"].train_dataset)
        for trainer in each.values():
            trainer.create_optimizer()
            step(trainer, batch)  # warm-up, and the optimiser state exists
        for _ in range(rounds):
            for name, trainer in each.items():
                start, busy = time.perf_counter(), time.process_time()
                step(trainer, batch)
                times[name].append(time.perf_counter() - start)
                cpu[name].append(time.process_time() - busy)
        memory, heads = {}, {}
        for name, trainer in each.items():
            trainer._metrics.clear()
            state = [v for s in trainer.optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
            with LiveMemory() as live:
                live.track(*trainer.model.parameters(), *trainer.model.buffers(), *state)
                step(trainer, batch)
            memory[name] = live.peak
            heads[name] = trainer._metrics["positive_heads"][-1] if "surgery" in name else 0
    return [
        {
            "tokens": tokens, "variant": name, "seconds": statistics.median(times[name]),
            "time_ratio": ratio(times, name), "cpu_ratio": ratio(cpu, name),
            "peak_mib": memory[name] / 2**20, "memory_ratio": memory[name] / memory["sft"],
            "positive_heads": heads[name], "heads": BLOCKS * HEADS, "cost": each[name].cost(),
        }
        for name in each
    ]  # fmt: skip


def ratio(seconds: dict[str, list[float]], name: str) -> float:
    """The median over rounds."""
    return statistics.median(t / b for t, b in zip(seconds[name], seconds["sft"], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--only", default="")
    parser.add_argument("--json")
    options = parser.parse_args()
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {BLOCKS} blocks, hidden {HIDDEN}, {HEADS} "
        f"heads on {KEY_HEADS}, batch {BATCH}, {PAIRS} pairs, {options.rounds} rounds"
    )
    columns = f"{'s/step':>7} {'time':>6} {'cpu':>6} {'MiB':>8} {'memory':>7} {'cost':>6} {'heads above 0':>14}"
    print(f"{'tokens':>6} {'':18} {columns}")
    rows = []
    for tokens in options.tokens:
        for r in measure(tokens, options.rounds, options.only):
            rows.append(r)
            print(
                f"{tokens:6} {r['variant']:18} {r['seconds']:7.3f} {r['time_ratio']:6.2f} {r['cpu_ratio']:6.2f} "
                f"{r['peak_mib']:8.1f} {r['memory_ratio']:7.3f} {r['cost']:6.2f} "
                f"{r['positive_heads']:11.0f}/{r['heads']}",
                flush=True,
            )
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"torch": torch.__version__, "threads": torch.get_num_threads(), "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
