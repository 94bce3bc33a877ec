"""What `tunevax plan` predicts for the models and methods of `gpu.py`, as a table: no GPU is needed, and none is timed.

    python benchmarks/plan.py [--json OUT]

Batch 10 x 200 tokens, half of each row its answer; LoRA of rank 8 on all linears; gamma 8 of T-Vaccine, the draw that
takes most. The floor of a step is its matrix products with the frozen weights of the blocks: 2 FLOP a weight and token
for each forward and each backward pass that the method is defined by, without adapters, attention, head or anything
done twice.
"""

import argparse
import json
import tempfile
import time

from gpu import GAMMA, MODELS, ROWS, TOKENS, config_of

from tunevax.methods import load_method
from tunevax.planning.step import predict
from tunevax.quiet import quiet

GIB = 2**30
RUNS = [  # method, options
    ("sft", {}), ("vaccine", {}), ("t-vaccine", {"gamma": GAMMA}), ("repnoise", {}), ("booster", {}),
    ("circuit-breakers", {}),
]  # fmt: skip
MODES = [("frozen", None), ("all", None), ("all", "nf4")]  # what is recomputed, how the blocks' weights are packed
PASSES = {"sft": 2, "vaccine": 4, "t-vaccine": 4, "repnoise": 4, "booster": 6, "circuit-breakers": 3.75}
"""Forward and backward passes over the rows of a batch that a method is defined by. T-Vaccine's lowest block may be the
first; RepNoise's pairs are as many rows again; a circuit breaker runs five eighths of the blocks,
with and without its adapter."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    options = parser.parse_args()
    quiet()
    rows = []
    for name in options.models:
        config = config_of(name, False)
        for method, values in RUNS:
            for recomputed, packed in MODES:
                trainer = load_method("tunevax.alignment", method)
                with tempfile.TemporaryDirectory() as folder:
                    args = trainer.config_class(
                        folder,
                        per_device_train_batch_size=ROWS,
                        max_length=TOKENS,
                        checkpoint_blocks=recomputed,
                        **values,
                    )
                start = time.process_time()
                found = predict(trainer, args, config, quantization=packed)
                embeddings = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
                floor = PASSES[method] * 2 * (found.parameters - embeddings) * ROWS * TOKENS
                rows.append({
                    "model": name, "method": method, "recomputed": recomputed, "quantization": packed,
                    "peak_gib": found.peak / GIB, "kinds_gib": {k: v / GIB for k, v in found.kinds.items()},
                    "forward": found.forward, "backward": found.backward, "flops": found.flops,
                    "floor_ratio": found.flops / floor, "seconds_to_plan": time.process_time() - start,
                })  # fmt: skip
                r = rows[-1]
                print(
                    f"{name:11} {method:17} {recomputed:7} {packed or 'bf16':5} {r['peak_gib']:6.2f} GiB  "
                    f"{r['forward']:.2f} forward {r['backward']:.2f} backward  {r['flops']:.2e} FLOP "
                    f"({r['floor_ratio']:.2f} x floor)  {r['seconds_to_plan']:.1f} s", flush=True,
                )  # fmt: skip
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
