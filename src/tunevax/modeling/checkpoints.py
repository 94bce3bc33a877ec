"""Checkpoints on disk: their config, weights and tokenizer."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tunevax.errors import UsageError, nearby, out_of_memory, shortened
from tunevax.files import GGUF, damage

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

OTHER_MEDIA = re.compile(r"vision|visual|audio|speech|image|video|multi_modal|mm_")
"""What the names of weights have in them that belong to the towers of other media beside a text model."""


def place(ref: str) -> tuple[str, dict[str, str]]:
    """Where `from_pretrained` reads a folder, a hub id or a GGUF file, and its further arguments. `ORG/NAME/FILE.gguf`
    is a file on the hub if there is none here. Raises `UsageError` for a file that cannot be read."""
    path = Path(ref)
    if path.suffix != GGUF:
        return ref, {}
    if importlib.util.find_spec("gguf") is None:
        raise UsageError(f"{ref} needs the package gguf; run pip install 'tunevax[gguf]'")
    if re.search(r"-\d{5}-of-\d{5}$", path.stem):
        raise UsageError(f"{ref} is one part of a model; join the parts with `llama-gguf-split --merge`")
    if why := damage(path):
        raise UsageError(why)
    return str(path.parent), {"gguf_file": path.name}


def config_of(base: str, revision: str | None = None) -> PretrainedConfig:
    """The transformers config of a model folder, GGUF file or hub id. Raises `UsageError` if there is none, or if the
    model needs code from its repository."""
    from transformers import AutoConfig

    path = Path(base)
    if not path.exists() and (base.startswith((".", "/", "~")) or (path.parent != Path() and path.parent.is_dir())):
        raise UsageError(f"no such model {'file' if path.suffix == GGUF else 'folder'}: {base}{nearby(base)}")
    source, gguf = place(base)
    try:
        return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False, **gguf)
    except Exception as error:  # transformers raises many kinds: no file, no JSON, a value of the wrong type
        raise _cannot_load(base, error) from error


def causal_model(base: str, revision: str | None, dtype: str) -> PreTrainedModel:
    """The causal language model of a folder, GGUF file or hub id, in `dtype`. A GGUF file is dequantised, by `auto` to
    bfloat16. Raises as `config_of` and `read_model` do."""
    from transformers import AutoModelForCausalLM, GgufConfig

    from tunevax.modeling.shapes import settle_config

    config = config_of(base, revision)
    settle_config(config, base)
    how: dict[str, Any] = {"config": config, "revision": revision, "dtype": dtype}
    if Path(base).suffix == GGUF:
        how |= {"quantization_config": GgufConfig(dequantize=True), "dtype": "bfloat16" if dtype == "auto" else dtype}
    model = read_model(AutoModelForCausalLM, base, **how)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # see `nf4`: it would repack the weight, without gradients
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    return model


def host_dtype(base: str, revision: str | None = None) -> str:
    """The dtype of a model on the CPU: bfloat16 for weights saved in two bytes or less, where the processor multiplies
    in it (AVX512-BF16 or AMX), else float32."""
    import torch

    saved = torch.bfloat16 if Path(base).suffix == GGUF else config_of(base, revision).dtype
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if fast and saved in (torch.bfloat16, torch.float16) else "float32"


def read_model(auto: Any, ref: str, **how: object) -> PreTrainedModel:
    """`auto.from_pretrained(ref, **how)`, if every weight of the model is in the checkpoint and no other.

    What transformers leaves out by design (`_keys_to_ignore_on_load_unexpected`, tied weights, the towers of other
    media beside a text model) is no weight of the model. Raises `UsageError` if the checkpoint cannot be read or does
    not fit; the message names files or weights.
    """
    if why := damaged_weights(Path(ref)):
        raise UsageError(why)
    source, gguf = place(ref)
    with _warnings_of_transformers() as warned:
        try:
            model, info = auto.from_pretrained(
                source, trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True, **gguf, **how
            )
        except Exception as error:  # OSError, SafetensorError, ImportError, RuntimeError, ...: as many as libraries
            if out_of_memory(error):
                raise
            # Experts that are fused as they are read, some of which are not there.
            if unfit := re.findall(r"^(\S+) +\| +CONVERSION", "\n".join(warned), re.MULTILINE):
                raise UsageError(
                    f"the weights of {ref} cannot be put together for {', '.join(unfit)}: parts are missing or of "
                    "unequal shape; get the whole checkpoint"
                ) from error
            raise _cannot_load(ref, error) from error
    config = how.get("config")
    if config is not None and type(model.config) is not type(config):  # the text model of one for other media too
        info["unexpected_keys"] = {key for key in info["unexpected_keys"] if not OTHER_MEDIA.search(key)}
    if why := misfit(info):
        raise UsageError(f"the weights of {ref} do not fit {type(model).__name__}: {why}")
    if getattr(model, "_hf_peft_config_loaded", False):  # by transformers itself, from a hub id
        raise UsageError(f"{ref} is an adapter; download it (`hf download {ref}`) and give the folder")
    from tunevax.modeling.adapters import record_ties

    record_ties(model)
    return model


def misfit(info: Mapping[str, Any]) -> str | None:
    """The problems in transformers' loading report, with names and a way out; None if there are none."""
    missing, extra = set(info["missing_keys"]), set(info["unexpected_keys"])
    parts = [
        f"{len(keys)} {what} ({', '.join(sorted(keys)[:3])}{', ...' if len(keys) > 3 else ''})"
        for keys, what in ((missing, "missing"), (extra, "not of this model")) if keys
    ]  # fmt: skip
    for key, saved, own in sorted(info["mismatched_keys"], key=lambda entry: entry[0])[:3]:
        parts.append(f"{key} is {list(saved)} in the checkpoint and {list(own)} in the model")
    if not parts:
        return None
    way = "get the whole checkpoint, of the architecture that config.json says"
    prefixes = {long.removesuffix(short) for short in list(missing)[:1] for long in extra if long.endswith(f".{short}")}
    if prefixes:
        way = f"it was saved from inside a wrapper, whose prefix is {min(prefixes, key=len)!r}: save the model in it"
    return f"{'; '.join(parts)}; {way}"


@contextmanager
def _warnings_of_transformers() -> Iterator[list[str]]:
    """What transformers' loading code warns of meanwhile, instead of on the screen."""
    lines: list[str] = []
    logger = logging.getLogger("transformers.modeling_utils")
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    before = logger.level, logger.propagate
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before


def damaged_weights(folder: Path) -> str | None:
    """What is wrong with the weight files that transformers would read in a model folder, or None."""
    names = (f"{stem}{end}" for stem in ("model.safetensors", "pytorch_model.bin") for end in ("", ".index.json"))
    file = next((folder / name for name in names if (folder / name).is_file()), None)
    if file is None:
        return None
    if (why := damage(file)) or file.suffix != ".json":
        return why
    try:
        shards = sorted(set(json.loads(file.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError):
        return f"{file} is no index of weights; download it again"
    if missing := [shard for shard in shards if not (folder / shard).is_file()]:
        return (
            f"{folder} lacks {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''} "
            f"({len(missing)} of {len(shards)} files that {file.name} names); download them"
        )
    return next((why for shard in shards if (why := damage(folder / shard))), None)


def require_finite(model: nn.Module, base: str) -> None:
    """Raise `UsageError` if a weight of the model is not a finite number: its answers would be invalid."""
    # The sum is one pass over the weights, in which whatever is not finite stays.
    weights = [(n, p.detach()) for n, p in model.named_parameters() if p.is_floating_point()]
    sums = ((name, w.sum(dtype=torch.promote_types(w.dtype, torch.float32))) for name, w in weights)
    if bad := [name for name, total in sums if not torch.isfinite(total)]:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise UsageError(f"{base} has weights that are not finite numbers ({bad[0]}{more}); get its files again")


def _cannot_load(base: str, error: Exception) -> UsageError:
    text, folder = str(error), Path(base)
    if "trust_remote_code" in text or "custom code" in text:
        return UsageError(f"{base} needs code from its own repository, which tunevax does not run")
    if why := damage(folder / "config.json"):
        return UsageError(why)
    if isinstance(error, ImportError):
        return UsageError(f"{base} needs a library that is not installed here: {shortened(error)}")
    what = "not a folder here, and not found on the hub"
    if folder.exists():
        what = f"the {'folder' if folder.is_dir() else 'file'} holds no model transformers can load"
    return UsageError(f"cannot load the model {base!r}: {what} ({shortened(error)}){nearby(base, 'organism')}")


def load_tokenizer(folder: str, base: str, revision: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer saved in `folder`, or else that of the base model; a GGUF file holds its tokenizer. Raises
    `UsageError` if neither loads."""
    from transformers import AutoTokenizer

    files = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
    source = folder if (Path(folder) / "tokenizer_config.json").is_file() else base
    if Path(source).is_dir() and not any((Path(source) / name).is_file() for name in files):
        raise UsageError(
            f"{source} has no tokenizer (no tokenizer.json, tokenizer_config.json or tokenizer.model); "
            "save one beside the model"
        )
    for name in files:
        if why := damage(Path(source) / name):
            raise UsageError(why)
    where, gguf = place(source)
    try:
        revision = revision if source == base else None
        return AutoTokenizer.from_pretrained(where, revision=revision, trust_remote_code=False, **gguf)
    except Exception as error:  # of tokenizers and sentencepiece too, which raise plain ones
        raise UsageError(f"cannot load the tokenizer of {source} ({shortened(error)})") from error
