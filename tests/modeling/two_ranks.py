"""Run by test_modeling, on two ranks under torch.distributed: three T-Vaccine steps, global batch 8, SGD; rank 0 saves the result."""

import os
import sys
import tempfile

import torch

from tunevax.alignment.t_vaccine import TVaccineConfig, TVaccineTrainer
from tunevax.data import load_safety
from tunevax.modeling import load

torch.set_num_threads(1)
ranks = int(os.environ.get("WORLD_SIZE", "1"))
loaded = load("organism", device="cpu")
config = TVaccineConfig(
    tempfile.mkdtemp(), gamma=2, max_steps=3, per_device_train_batch_size=8 // ranks, learning_rate=0.1, optim="sgd",
    weight_decay=0.0, max_grad_norm=0.0, lr_scheduler_type="constant", warmup_steps=0, max_length=64, use_cpu=True,
    save_strategy="no", rho=0.5,
)  # fmt: skip
rows = load_safety("organism", "alignment")[:64]
trainer = TVaccineTrainer(loaded.model, config, safety_data=rows, processing_class=loaded.tokenizer)
trainer.train()
if int(os.environ.get("RANK", "0")) == 0:
    weights = {n: p.detach() for n, p in trainer.model.named_parameters() if "lora_" in n}
    history = [line for line in trainer.state.log_history if "embedding_grad_norm" in line]
    result = {
        "weights": weights,
        "norms": [h["embedding_grad_norm"] for h in history],
        "selected": [h["selected"] for h in history],
    }
    torch.save(result, sys.argv[1])
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
