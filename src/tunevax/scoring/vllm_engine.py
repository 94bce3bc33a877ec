"""`--engine vllm`: vLLM in place of transformers' generation, for `tunevax score`.

Tested with vLLM 0.32 on a CPU, where its greedy answers equalled those of `--engine transformers` (fp32, random Llama,
tests/scoring/test_vllm.py). They may differ: other kernels round differently, which matters where two tokens are almost
equally likely. On a CPU vLLM reserves most of the memory for its cache; `VLLM_CPU_KVCACHE_SPACE=4` limits it to 4 GiB.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

from tunevax.errors import RunError, UsageError, shortened
from tunevax.records import Prompt
from tunevax.scoring.generation import FROM_THE_FIRST, answer, encoded_prompts, ends_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

UNSUPPORTED = {
    **{name: off for name, off in FROM_THE_FIRST.items() if name != "min_new_tokens"}, "begin_suppress_tokens": (None,),
    "sequence_bias": (None,), "bad_words_ids": (None,), "forced_bos_token_id": (None,), "suppress_tokens": (None,),
    "stop_strings": (None, []), "watermarking_config": (None,), "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
}  # fmt: skip
"""Settings of a generation config that change greedy text in transformers, with their values when off."""


def require_vllm() -> ModuleType:
    """The module; a `UsageError` if it is not installed."""
    try:
        import vllm
    except ImportError as error:
        raise UsageError("--engine vllm needs vLLM; pip install 'tunevax[vllm]'") from error
    return vllm


def loading(ref: str, revision: str | None, dtype: str) -> dict[str, str]:
    """How to load a model for vLLM: on the CPU, where its adapters are merged and which leaves the accelerator's memory
    to vLLM; in the checkpoint's dtype, as on an accelerator."""
    from tunevax.lineage import Lineage
    from tunevax.modeling.checkpoints import config_of

    if dtype == "auto":
        dtype = str(config_of(Lineage.of(ref).base, revision).dtype or "float32").removeprefix("torch.")
    return {"dtype": dtype, "device": "cpu"}


def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], max_new_tokens: int = 128,
    batch_size: int = 128, prefix: str | Sequence[str] = "", places: Sequence[str] | None = None,
) -> list[str]:  # fmt: skip
    """As `tunevax.scoring.generation.generate`, by vLLM: prompts and answers are passed as token ids, so template, ends
    and decoding are the same. The merged weights are written to a temporary folder (in `TMPDIR`). `batch_size` is
    ignored; vLLM batches by itself. Raises `UsageError` if a prompt fills the model's context, or the generation config
    has a setting of `UNSUPPORTED`; `RunError` if vLLM cannot load or run the model."""
    vllm = require_vllm()
    config = model.generation_config
    for name, off in UNSUPPORTED.items():
        if getattr(config, name, None) not in off:
            why = "which --engine vllm does not support; leave --engine out"
            raise UsageError(f"the model's generation config has {name}, {why}")
    prefixes = [prefix] * len(prompts) if isinstance(prefix, str) else prefix
    encoded, rooms, begun = encoded_prompts(model, tokenizer, prompts, max_new_tokens, prefixes, places)
    shared = {"temperature": 0.0, "stop_token_ids": ends_of(model, tokenizer), "min_tokens": config.min_new_tokens or 0,
              "repetition_penalty": config.repetition_penalty or 1.0, "detokenize": False}  # fmt: skip
    longest = max(len(ids) + room for ids, room in zip(encoded, rooms, strict=True))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        try:
            engine = vllm.LLM(model=folder, dtype=str(model.dtype).removeprefix("torch."), max_model_len=longest)
            outputs = engine.generate(
                [{"prompt_token_ids": ids} for ids in encoded],
                [vllm.SamplingParams(max_tokens=room, **shared) for room in rooms],
            )
        except Exception as error:  # in its own process, which logs it
            name = type(model).__name__
            raise RunError(f"vLLM could not run {name} ({shortened(error)}); its log above says why") from error
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    return [answer(tokenizer, *one) for one in zip(begun, tokens, prefixes, strict=True)]
