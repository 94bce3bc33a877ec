"""Peak memory and step time on one GPU, beside the peak that `tunevax plan` says.

    python benchmarks/gpu.py --json OUT [--minutes 9]
    python benchmarks/gpu.py --device cpu --tiny        a rehearsal on small shapes, without a GPU

Llama-2-7B, Qwen2-7B and Gemma-2-2B with random weights, made on the GPU: nothing is downloaded. The batch is that of
arXiv 2410.09760, 10 rows of 200 tokens, half of each its answer; LoRA of rank 8 on all linears.

Peak: what the allocator gave out at most during the second step, when the optimiser has its state. T-Vaccine trains
all blocks in the first step, so that all have theirs, then the lowest gamma, which is the draw that takes most memory
and time; it probes in the second step. Seconds: the median of the steps after that, probes not in them. `stock` is
transformers' Trainer with PEFT: logits of all tokens, nothing recomputed, no prediction. The file is written after
each entry; an entry that fails is there with its error, one for which no time is left under `skipped`.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers as t

from tunevax.methods import load_method
from tunevax.modeling.memory import LiveMemory
from tunevax.modeling.quantization import scales_of
from tunevax.planning.step import predict, trainer_on
from tunevax.quiet import quiet

SEED, STEPS, GAMMA = 0, 7, 8
ROWS, TOKENS = 10, 200
MODELS = {  # their public config.json
    "Llama-2-7B": (t.LlamaConfig, {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
    }),
    "Qwen2-7B": (t.Qwen2Config, {
        "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 131072, "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "use_sliding_window": False,
        "tie_word_embeddings": False,
    }),
    "Gemma-2-2B": (t.Gemma2Config, {
        "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6, "query_pre_attn_scalar": 256, "sliding_window": 4096, "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0, "tie_word_embeddings": True,
    }),
}  # fmt: skip
TINY = {
    "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 10, "num_attention_heads": 4,
    "max_position_embeddings": 512, "head_dim": 16,
}  # fmt: skip
RUNS = [  # method, what is recomputed, how the blocks' weights are packed
    ("stock", "none", None), ("sft", "frozen", None), ("vaccine", "frozen", None), ("t-vaccine", "frozen", None),
    ("t-vaccine", "all", None), ("t-vaccine", "frozen", "nf4"), ("t-vaccine", "all", "nf4"),
    ("repnoise", "frozen", None), ("booster", "frozen", None),
]  # fmt: skip
PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "tunevax")


class Meter(t.TrainerCallback):
    """The peak of the second step, and the seconds of each one after it."""

    def __init__(self, trainer, device):
        self.trainer, self.cuda, self.seconds, self.open = trainer, device == "cuda", [], ExitStack()

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **_):
        if state.global_step == 1:
            if hasattr(self.trainer, "scores"):
                self.trainer.scores = None  # T-Vaccine probes when it has none
            if self.cuda:
                torch.cuda.empty_cache()  # of what was reserved for the first step
                torch.cuda.reset_peak_memory_stats()
            else:
                self.live = self.open.enter_context(LiveMemory())
                states = [v for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
                self.live.track(*model.parameters(), *model.buffers(), *scales_of(model), *states)
        self.start = self.now()

    def on_step_end(self, args, state, control, **_):
        if state.global_step > 2:
            self.seconds.append(self.now() - self.start)
        elif state.global_step == 2:
            self.open.close()
            self.peak = torch.cuda.max_memory_allocated() if self.cuda else self.live.peak
            self.reserved = torch.cuda.max_memory_reserved() if self.cuda else None

    def now(self):
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


def config_of(name, tiny):
    kind, values = MODELS[name]
    if tiny:
        grouped = values["num_key_value_heads"] < values["num_attention_heads"]
        values = {**values, **TINY, "num_key_value_heads": 2 if grouped else 4}
    return kind(**values)


def arguments(method, recompute, options, folder, device):
    """The configuration of a method, or `TrainingArguments`."""
    shared = {
        "output_dir": folder, "max_steps": STEPS, "per_device_train_batch_size": options.rows, "seed": SEED,
        "dataloader_drop_last": True, "save_strategy": "no", "report_to": "none", "use_cpu": device == "cpu",
    }  # fmt: skip
    if method == "stock":
        return t.TrainingArguments(**shared, disable_tqdm=True, logging_strategy="no")
    own = {"gamma": GAMMA} if method == "t-vaccine" else {}
    kind = load_method("tunevax.alignment", method).config_class
    return kind(**shared, **own, max_length=options.tokens, checkpoint_blocks=recompute)


def trainer_of(method, recompute, model, options, folder):
    """As `tunevax align` has it; `stock` is transformers' own on the adapter and the rows of our SFT."""
    args = arguments("sft" if method == "stock" else method, recompute, options, folder, options.device)
    cls = load_method("tunevax.alignment", "sft" if method == "stock" else method)
    trainer = trainer_on(cls, model, args, options.tokens // 2)
    if method == "stock":
        ours, args = trainer, arguments("stock", None, options, folder, options.device)
        trainer = t.Trainer(ours.model, args, data_collator=ours.data_collator, train_dataset=ours.train_dataset)
        trainer.remove_callback(t.PrinterCallback)
    if method == "t-vaccine":
        trainer.for_plan()
        worst = trainer.draw
        trainer.draw = lambda: worst() if trainer.state.global_step else list(range(len(trainer.blocks)))
    return trainer


def measure(name, method, recompute, quantization, options, folder):
    """Train a few steps. The model is freed with this frame."""
    torch.manual_seed(SEED)
    before = torch.cuda.memory_allocated() if options.device == "cuda" else 0
    with torch.device(options.device):
        model = t.AutoModelForCausalLM.from_config(config_of(name, options.tiny), dtype=options.dtype)
    if quantization:
        from tunevax.modeling.packing import quantize

        quantize(model, quantization)
    trainer = trainer_of(method, recompute, model, options, folder)
    meter = Meter(trainer, options.device)
    trainer.add_callback(meter)
    with meter.open:
        trainer.train()
    return {
        "peak": meter.peak, "reserved": meter.reserved, "allocated_before": before, "all_seconds": meter.seconds,
        "seconds": statistics.median(meter.seconds),
    }  # fmt: skip


def predicted(name, method, recompute, quantization, options, folder):
    """What the plan says, which needs no device."""
    cls, args = load_method("tunevax.alignment", method), arguments(method, recompute, options, folder, "cpu")
    where = {"device": options.device, "dtype": options.dtype, "quantization": quantization}
    found = vars(predict(cls, args, config_of(name, options.tiny), **where))
    return {"predicted": found.pop("peak"), **found}


def caught(entry, key, function, *given):
    """Add what a function finds to an entry, or the error: the other entries go on."""
    try:
        entry.update(function(*given))
    except Exception as error:
        entry[key] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def environment(options):
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    cuda = options.device == "cuda"
    return {
        "command": " ".join(["python", "benchmarks/gpu.py", *sys.argv[1:]]), "versions": versions, "seed": SEED,
        "device": torch.cuda.get_device_name() if cuda else "CPU", "cuda": torch.version.cuda,
        "driver": subprocess.getoutput("nvidia-smi --query-gpu=driver_version --format=csv,noheader") if cuda else None,
        "rows": options.rows, "tokens": options.tokens, "dtype": str(options.dtype).removeprefix("torch."),
        "tiny": options.tiny, "steps": STEPS, "gamma": GAMMA, "lora_r": 8,
    }  # fmt: skip


def line(entry, stock, unit):
    """An entry as a line of the table; seconds also as a multiple of the stock step."""
    told = f"{entry['model']:11} {entry['method']:10} {entry['quantization'] or 'no':4} {entry['recompute']:7}"
    measured, said, seconds = entry.get("peak"), entry.get("predicted"), entry.get("seconds")
    told += f"{measured / unit:9.2f}" if measured else f"{'-':>9}"
    told += f"{said / unit:10.2f}" if said else f"{'-':>10}"
    told += f"{said / measured:8.3f}" if measured and said else f"{'-':>8}"
    told += f"{seconds:9.3f}" if seconds else f"{'-':>9}"
    reference = stock.get(entry["model"])
    told += f"{seconds / reference:9.2f}" if seconds and reference else f"{'-':>9}"
    return "  ".join([told, *(f"{k}: {entry[k]}" for k in ("error", "prediction_error") if k in entry)])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="the file to write, anew after each entry")
    parser.add_argument("--minutes", type=float, default=9, help="start no entry that would not end within these")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes of the same families, 4 rows of 64 tokens")
    options = parser.parse_args()
    quiet()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here; --device cpu --tiny rehearses on small shapes")
    if options.device == "cpu" and not options.tiny:
        raise SystemExit("models of 7 billion weights are too slow on a CPU; add --tiny")
    options.rows, options.tokens = (4, 64) if options.tiny else (ROWS, TOKENS)
    options.dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    start, longest, stock = time.perf_counter(), 0.0, {}
    unit, unit_name = (2**20, "MiB") if options.tiny else (2**30, "GiB")
    found = {**environment(options), "entries": [], "skipped": []}
    title = "a rehearsal on small shapes, no evidence of a real model: " if options.tiny else ""
    print(f"{title}{found['device']}, {options.rows} x {options.tokens} tokens, {found['dtype']}; {found['versions']}")
    print(f"{'model':11} {'method':10} bits again    {unit_name:>8} predicted   ratio   s/step  x stock", flush=True)

    def written(entry):
        print(line(entry, stock, unit), flush=True)
        if options.json:
            options.json.write_text(json.dumps(found, indent=1))

    for run in [(name, *run) for name in MODELS for run in RUNS]:
        entry = dict(zip(("model", "method", "recompute", "quantization"), run, strict=True))
        began = time.perf_counter()
        if began - start + longest > 60 * options.minutes:
            found["skipped"].append(entry)
            continue
        with tempfile.TemporaryDirectory() as folder:
            caught(entry, "error", measure, *run, options, folder)
        longest = max(longest, time.perf_counter() - began)
        stock[entry["model"]] = entry.get("seconds") if entry["method"] == "stock" else stock.get(entry["model"])
        found["entries"].append(entry)
        written(entry)
    print("and what the plan says", flush=True)  # last: it needs no GPU
    for entry in [e for e in found["entries"] if e["method"] != "stock"]:
        if time.perf_counter() - start < 60 * options.minutes:
            run = [entry[key] for key in ("model", "method", "recompute", "quantization")]
            with tempfile.TemporaryDirectory() as folder:
                caught(entry, "prediction_error", predicted, *run, options, folder)
            written(entry)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    for entry in found["skipped"]:
        print("skipped, no time left:", *(str(v) for v in entry.values() if v))


if __name__ == "__main__":
    main()
