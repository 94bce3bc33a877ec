"""Loading a model and its tokenizer from a hub id, a model folder, an adapter folder or a run folder."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tunevax.data.chat import recorded
from tunevax.data.encoding import set_chat_template
from tunevax.environment import host_memory
from tunevax.errors import UsageError, unknown
from tunevax.files import BIASES, model_hash
from tunevax.lineage import Lineage, absolute
from tunevax.modeling import adapters as peft
from tunevax.modeling.biases import attach_biases, read_biases
from tunevax.modeling.blocks import unwrap
from tunevax.modeling.checkpoints import causal_model, host_dtype, load_tokenizer, require_finite
from tunevax.modeling.quantization import dequantize, require_quantization, saved_quantization, size_of
from tunevax.records import ModelInfo

DTYPES = ("auto", "float32", "bfloat16", "float16")


class Loaded(NamedTuple):
    """A model ready to use."""

    model: Any  # the transformers model; a `PeftModel` if the last adapter was not merged
    tokenizer: Any  # with a chat template and a padding token
    info: ModelInfo  # for run.json


def load(
    ref: str, *, revision: str | None = None, dtype: str = "auto", device: str | None = None,
    chat_template: str | None = None, merge: bool = True, trainable: bool = False, quantization: str | None = None,
    kept: dict[Any, Any] | None = None,
) -> Loaded:  # fmt: skip
    """Load `ref`, in full precision by default: also a run whose adapter was trained on a quantised base.

    Args:
        ref: a hub id, a folder with a model, a folder with a PEFT adapter, a run folder, or `organism`. The adapters
            of a run and its parents are applied in order, each merged before the next; biases beside the weights, or
            in an adapter's place (a safety lock), are attached.
        revision: of a hub id.
        dtype: auto (the checkpoint's on an accelerator, `host_dtype` on the CPU), float32, bfloat16 or float16.
        device: default cuda if there is one, else cpu.
        chat_template: alpaca, a jinja file, or None for the tokenizer's own.
        merge: merge the last adapter too; otherwise it stays a `PeftModel`.
        trainable: with `merge=False`, leave the last adapter trainable.
        quantization: of the linear layers in the blocks: nf4, int8, or None. From `dtype`, after all that is merged on
            the host: a merge into quantised weights would round them twice. Matrix by matrix, on `device`.
        kept: holds the base of the last load on the host, for a process that loads it again and again.

    Every weight that is missing, left over or of another shape is an error, as is an adapter that moves no logit. A
    merge is compared with the unmerged model on a few tokens; where rounding to the dtype loses too much of an adapter,
    `dtype="auto"` starts over in float32, and an explicit dtype is refused.

    Raises:
        UsageError: nothing loadable is there; the model needs code from its repository; no tokenizer or template; it
            cannot be quantised; its weights or an adapter's are damaged, or do not fit.
    """
    from peft import PeftModel

    from tunevax.modeling.shapes import require_language_model, settle_tokens

    require_quantization(quantization)
    if quantization is not None:
        from tunevax.modeling.packing import quantize
    lineage = Lineage.of(ref)
    base, adapters = lineage.base, lineage.adapters
    require_same_base(base, adapters)
    if device is None:  # under a launcher each process has its own
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    chosen = host_dtype(base, revision) if dtype == "auto" and device == "cpu" else dtype
    model: Any = _base_model(base, revision, chosen, kept)  # or a `PeftModel` with it inside
    require_finite(model, base)
    locks = [(adapter / BIASES).is_file() for adapter in adapters]
    merging = [not lock and (merge or i < len(adapters) - 1) for i, lock in enumerate(locks)]
    saved_in = saved_quantization(model)
    if saved_in and any(merging):
        dequantize(model, base)
    attach_biases(model, read_biases(base))
    tokenizer = load_tokenizer(str(adapters[-1]) if adapters else base, base, revision)
    set_chat_template(tokenizer, chat_template)
    if quantization is None:  # merges, and what they are checked by, run where the model will
        model.to(device)
    merges, why = [], ""
    try:
        for adapter, lock, merged in zip(adapters, locks, merging, strict=True):
            if lock:
                attach_biases(model, read_biases(adapter))
                continue
            if quantization is not None and not merged:
                quantize(model, quantization, device)
            model = peft.load_adapter(model, adapter, trainable and not merged)
            if merged:
                model, result = peft.merge(model, str(adapter))
                merges.append(result._asdict())
        if quantization is not None and not isinstance(model, PeftModel):
            quantize(model, quantization, device)
        model.to(device).eval()
        if isinstance(model, PeftModel):
            peft.effect(model, str(adapters[-1]))
    except peft.RoundedAway as error:
        if dtype != "auto":
            raise UsageError(f"{error}; use --dtype float32") from error
        why = str(error)
    if why:  # out of the handler, which would keep the first model
        del model
        again = load(
            ref, revision=revision, dtype="float32", device=device, chat_template=chat_template, merge=merge,
            trainable=trainable, quantization=quantization, kept=kept,
        )  # fmt: skip
        again.info["widened"] = why
        return again
    settle_tokens(model, tokenizer, ref)
    require_language_model(model)
    stock = unwrap(model)
    info: ModelInfo = {
        "ref": absolute(ref), "base": absolute(base),
        "revision": getattr(stock.config, "_commit_hash", None) or revision, "hash": model_hash(base),
        "class": type(stock).__name__, "blocks": getattr(stock.config.get_text_config(), "num_hidden_layers", None),
        "parameters": sum(size_of(p) for p in stock.parameters()), "dtype": str(stock.dtype).removeprefix("torch."),
        "quantization": quantization, "saved_in": saved_in, "adapters": [str(a.absolute()) for a in adapters],
        "adapter_hashes": [model_hash(str(a)) for a in adapters], "merges": merges, "widened": None,
        "chat": recorded(tokenizer), "attached": any((f / BIASES).is_file() for f in (Path(base), *adapters)),
    }  # fmt: skip
    return Loaded(model, tokenizer, info)


def _base_model(base: str, revision: str | None, dtype: str, kept: dict[Any, Any] | None) -> Any:
    """`causal_model`, or a copy of the one in `kept`. Nothing is kept that takes over an eighth of the memory."""
    if kept is None:
        return causal_model(base, revision, dtype)
    key = (base, revision, dtype, model_hash(base))
    if key not in kept:
        kept.clear()
        model = causal_model(base, revision, dtype)
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        if 8 * size > host_memory() or saved_quantization(model):
            return model
        kept[key] = model
    return copy.deepcopy(kept[key])


def require_same_base(base: str, adapters: list[Path]) -> None:
    """Raise `UsageError` if a run of the chain was trained on other weights than are below its adapter now."""
    for i, adapter in enumerate(adapters):
        known = Lineage.of(adapter).record.get("model") or {}
        hashes = dict(zip(known.get("adapters", []), known.get("adapter_hashes", []), strict=False))
        hashes[str(known.get("base"))] = known.get("hash")
        for below in (Path(base), *adapters[:i]):
            place = str(below.absolute())
            if hashes.get(place) and hashes[place] != model_hash(place):
                raise UsageError(
                    f"{below} has changed since {adapter.parent} was trained on it, so its adapter belongs to another "
                    "model; restore the old one, or train again"
                )
