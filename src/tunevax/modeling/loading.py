"""Loading a model and its tokenizer from a hub id, a model folder, an adapter folder or a run folder."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from tunevax.data.chat import recorded
from tunevax.data.encoding import set_chat_template
from tunevax.errors import UsageError, nearby, out_of_memory, shortened, unknown
from tunevax.runs import is_run, read_run

BIASES = "bias.safetensors"
"""Beside the weights of a model, or as an adapter of its own: vectors that are added to the output of attention output
projections, whether or not the architecture has a bias there. Block number to [hidden], fp32."""
DTYPES = ("auto", "float32", "bfloat16", "float16")
OTHER_MEDIA = re.compile(r"vision|visual|audio|speech|image|video|multi_modal|mm_")
"""What the names of weights have in them that belong to the towers of other media beside a text model."""
QUANTIZATIONS = ("nf4", "int8")
"""What the linear layers in the blocks can be packed into: see `tunevax.modeling.quantization`."""


class Loaded(NamedTuple):
    """A model ready to use.

    Attributes:
        model: the transformers model; a `PeftModel` if the last adapter was not merged.
        tokenizer: its tokenizer, with a chat template and a padding token.
        info: what run.json records: ref, base, revision, hash, class, parameters, dtype, quantization, adapters with
            their hashes (`adapter_hashes`), how each merge of one went (`merges`: the dtype, the share `kept` of the
            update after rounding, how far `off` the logits are, in units of what the adapter moves them, and how far
            `along` that move), why the weights are in float32 where the checkpoint's dtype could not hold a merge
            (`widened`), the kind of quantisation that the base was saved in (`saved_in`), and whether biases are
            attached (`attached`), which no stock checkpoint of the model holds.
    """

    model: Any
    tokenizer: Any
    info: dict[str, Any]


def load(
    ref: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    chat_template: str | None = None,
    merge: bool = True,
    trainable: bool = False,
    quantization: str | None = None,
) -> Loaded:
    """Load `ref`, in full precision unless told otherwise: also a run whose adapter was trained on a quantised base.

    Args:
        ref: a hub id, a folder with a model, a folder with a PEFT adapter, a run folder, or `organism`. The adapters
            of a run and its parents are applied in order, each merged before the next; biases beside the weights, or
            in an adapter's place (a safety lock), are attached.
        revision: of a hub id.
        dtype: auto (the checkpoint's on an accelerator, float32 on the CPU), float32, bfloat16 or float16.
        device: default cuda if there is one, else cpu.
        chat_template: alpaca, a jinja file, or None for the tokenizer's own.
        merge: merge the last adapter too; otherwise it stays a `PeftModel`.
        trainable: with `merge=False`, leave the last adapter trainable.
        quantization: of the linear layers in the blocks: nf4, int8, or None. From `dtype`, after all that is merged on
            the host: a merge into quantised weights would round them twice. Matrix by matrix, on `device`.

    Every weight that is missing, left over or of another shape is an error, as is an adapter that moves no logit. A
    merge is compared with the unmerged model on a few tokens; where rounding to the dtype loses too much of an adapter,
    `dtype="auto"` starts over in float32, and a dtype that was asked for is refused.

    Raises:
        UsageError: nothing loadable is there; the model needs code from its repository; no tokenizer or template; it
            cannot be quantised; its weights or an adapter's are damaged, or do not fit.
    """
    import torch
    from peft import PeftModel

    from tunevax.modeling import adapters as peft
    from tunevax.modeling.shapes import require_language_model, settle_tokens

    require_quantization(quantization)
    base, adapters = resolve(ref)
    require_same_base(base, adapters)
    if device is None:  # under a launcher each process has its own
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    if dtype not in DTYPES:
        raise UsageError(f"dtype is {dtype!r}; known: {', '.join(DTYPES)}")
    chosen = dtype if dtype != "auto" else "float32" if device == "cpu" else "auto"
    model = _model(base, revision, chosen)
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
    merges = []
    try:
        for adapter, lock, merged in zip(adapters, locks, merging, strict=True):
            if lock:
                attach_biases(model, read_biases(adapter))
                continue
            if quantization is not None and not merged:
                _quantize(model, quantization, device)
            model = peft.load_adapter(model, adapter, trainable and not merged)
            if merged:
                model, result = peft.merge(model, str(adapter))
                merges.append(result._asdict())
        if quantization is not None and not isinstance(model, PeftModel):
            _quantize(model, quantization, device)
        model.to(device).eval()
        if isinstance(model, PeftModel):
            peft.effect(model, str(adapters[-1]))
    except peft.RoundedAway as error:
        if dtype != "auto":
            raise UsageError(f"{error}; use --dtype float32") from error
        why = str(error)
    else:
        why = None
    if why:  # out of the handler, which would keep the first model
        del model
        again = load(
            ref, revision=revision, dtype="float32", device=device, chat_template=chat_template, merge=merge,
            trainable=trainable, quantization=quantization,
        )  # fmt: skip
        again.info["widened"] = why
        return again
    settle_tokens(model, tokenizer, ref)
    require_language_model(model)
    stock = model.get_base_model() if isinstance(model, PeftModel) else model
    info = {
        "ref": absolute(ref),
        "base": base if not Path(base).exists() else str(Path(base).absolute()),
        "revision": getattr(stock.config, "_commit_hash", None) or revision,
        "hash": model_hash(base),
        "class": type(stock).__name__,
        "blocks": getattr(stock.config.get_text_config(), "num_hidden_layers", None),
        "parameters": sum(size_of(p) for p in stock.parameters()),
        "dtype": str(stock.dtype).removeprefix("torch."),
        "quantization": quantization,
        "saved_in": saved_in,
        "adapters": [str(a.absolute()) for a in adapters],
        "adapter_hashes": [model_hash(str(a)) for a in adapters],
        "merges": merges,
        "widened": None,
        "chat": recorded(tokenizer),
        "attached": any((Path(folder) / BIASES).is_file() for folder in (base, *adapters)),
    }
    return Loaded(model, tokenizer, info)


def require_same_base(base: str, adapters: list[Path]) -> None:
    """Raise `UsageError` if a run of the chain was trained on other weights than are below its adapter now."""
    for i, adapter in enumerate(adapters):
        known = read_run(adapter.parent).get("model", {}) if is_run(adapter.parent) else {}
        hashes = dict(zip(known.get("adapters", []), known.get("adapter_hashes", []), strict=False))
        hashes[known.get("base")] = known.get("hash")
        for below in (base, *adapters[:i]):
            place = str(Path(below).absolute())
            if hashes.get(place) and hashes[place] != model_hash(place):
                raise UsageError(
                    f"{below} has changed since {adapter.parent} was trained on it, so its adapter belongs to another "
                    "model; put the old one back, or train again"
                )


def saved_quantization(model: Any) -> str | None:
    """The kind of quantisation that a model was saved in, such as bitsandbytes, if it is still in it."""
    if not getattr(model, "is_quantized", False):
        return None
    method = getattr(model, "quantization_method", None)
    return str(getattr(method, "value", method or "an unknown kind"))


def dequantize(model: Any, base: str) -> None:
    """Give `model` weights in its dtype instead of quantised ones, in place: a merge would round those again.

    Raises:
        UsageError: transformers cannot do that for this kind.
    """
    kind = saved_quantization(model)
    try:
        model.dequantize(dtype=model.dtype)
    except Exception as error:
        raise UsageError(
            f"the weights of {base} are saved in {kind}, in which an adapter cannot be merged without rounding them "
            "again; let the adapter name the base in full precision"
        ) from error
    for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized"):
        setattr(model, flag, False)


def require_quantization(kind: str | None, full_weights: bool = False) -> None:
    """Raise `UsageError` if `kind` is not known, not to be had here, or of weights that are to train."""
    if kind is None:
        return
    if kind not in QUANTIZATIONS:
        raise unknown("quantization", kind, QUANTIZATIONS)
    if full_weights:
        raise UsageError(
            f"full_weights trains all weights, and those of an {kind} base are frozen; leave out --full-weights or "
            "--quantization"
        )
    import tunevax.modeling.quantization  # noqa: F401  says what is missing


def _quantize(model: Any, kind: str, device: str) -> None:
    from tunevax.modeling.quantization import quantize

    quantize(model, kind, device)


def size_of(parameter: Any) -> int:
    """The number of weights that a parameter holds: of 4-bit ones, which share bytes, more than it has elements."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def scales_of(model: Any) -> list[Any]:
    """The tensors that quantised layers hold beside their parameters and buffers."""
    found = []
    for module in model.modules():
        if (packed := getattr(module, "quant_state", None)) is not None:  # 4 bits: scales, and the scales of scales
            found += [packed.absmax, packed.code, packed.offset, packed.state2.absmax, packed.state2.code]
        elif getattr(getattr(module, "state", None), "SCB", None) is not None:  # 8 bits
            found.append(module.state.SCB)
    return found


def absolute(ref: str) -> str:
    """`ref` as it stays true in another working directory: an absolute path, a hub id, or `organism`."""
    return str(Path(ref).absolute()) if ref != "organism" and Path(ref).exists() else ref


def resolve(ref: str) -> tuple[str, list[Path]]:
    """The base model of `ref` and the adapters to apply to it, lowest first."""
    if ref == "organism":
        from tunevax.organism import path as shipped

        return str(shipped()), []
    path = Path(ref)
    if is_run(path):
        record = read_run(path)
        if (path / "model" / "config.json").is_file():
            return str(path / "model"), []
        if not any((path / "adapter" / name).is_file() for name in ("adapter_config.json", BIASES)):
            why = (
                "its attacked weights were deleted; attack again with --keep-weights"
                if record["verb"] == "attack"
                else "it holds no weights"
            )
            raise UsageError(f"{ref} cannot be loaded as a model: {why}")
        base, adapters = resolve(record.get("adapter_on") or record["parent"] or record["model"]["ref"])
        return base, [*adapters, path / "adapter"]
    if (path / "adapter_config.json").is_file():
        base = adapter_config(path).get("base_model_name_or_path")
        if not base:
            raise UsageError(f"{ref} is an adapter that does not name its base model")
        below, adapters = resolve(base)
        return below, [*adapters, path]
    if path.is_dir() and not (path / "config.json").is_file():
        raise UsageError(f"{ref} is neither a model folder (no config.json) nor a finished run (no run.json)")
    return ref, []


def adapter_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of an adapter folder.

    Raises:
        UsageError: it cannot be read.
    """
    file = folder / "adapter_config.json"
    if why := damage(file):
        raise UsageError(why)
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{file} cannot be read as a JSON object; save the adapter again") from error


class AddedBias:
    """A forward hook that adds a vector [hidden] to a module's output. Nothing trains it and no state dict has it."""

    def __init__(self, bias: Any) -> None:
        self.bias = self.ready = bias

    def __call__(self, _module: Any, _args: Any, output: Any) -> Any:
        """The output with the bias, in the output's dtype."""
        if self.ready.device != output.device or self.ready.dtype != output.dtype:
            self.ready = self.bias.to(output)
        return output + self.ready


def attach_biases(model: Any, biases: Mapping[int, Any]) -> list[Any]:
    """Add `biases[i]`, [hidden], to the output of block i's attention output projection, below any adapter on it.

    Returns:
        The handles of the hooks, each with `remove()`.
    """
    from tunevax.modeling.blocks import find_blocks

    blocks = find_blocks(model, "o_proj") if biases else []
    return [innermost(blocks[i].o_proj).register_forward_hook(AddedBias(bias)) for i, bias in biases.items()]


def attached_biases(model: Any) -> dict[int, Any]:
    """What `attach_biases` added to `model` so far, summed, by block."""
    from tunevax.modeling.blocks import find_blocks

    if not any(isinstance(h, AddedBias) for m in model.modules() for h in m._forward_hooks.values()):
        return {}  # nor need there be blocks
    found = {}
    for i, block in enumerate(find_blocks(model, "o_proj")):
        hooks = innermost(block.o_proj)._forward_hooks.values()
        for bias in (hook.bias for hook in hooks if isinstance(hook, AddedBias)):
            found[i] = found[i] + bias if i in found else bias
    return found


def save_biases(model: Any, folder: Path) -> bool:
    """Write what is attached to `model` into the folder that its weights are saved in: they do not hold it.

    Returns:
        Whether there was anything, which stock transformers will not read.
    """
    biases = attached_biases(model)
    if biases:
        write_biases(biases, folder)
    return bool(biases)


def write_biases(biases: Mapping[int, Any], folder: Path) -> None:
    """Write biases, [hidden] by block, for `load` to attach."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file({str(i): bias.detach().float().cpu().contiguous() for i, bias in biases.items()}, folder / BIASES)


def read_biases(folder: str | Path) -> dict[int, Any]:
    """The biases in a folder, by block; none if it has no such file."""
    from safetensors.torch import load_file

    file = Path(folder) / BIASES
    return {int(i): bias for i, bias in load_file(file).items()} if file.is_file() else {}


def innermost(module: Any) -> Any:
    """The layer that PEFT has wrapped, however often; the module itself if it has not."""
    while hasattr(module, "base_layer"):
        module = module.base_layer
    return module


def config_of(base: str, revision: str | None = None) -> Any:
    """The transformers config of a model folder or hub id.

    Raises:
        UsageError: there is none, or the model needs code from its repository.
    """
    from transformers import AutoConfig

    path = Path(base)
    if not path.exists() and (base.startswith((".", "/", "~")) or (path.parent != Path() and path.parent.is_dir())):
        raise UsageError(f"no such model folder: {base}{nearby(base)}")
    try:
        return AutoConfig.from_pretrained(base, revision=revision, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds: no file, no JSON, a value of the wrong type
        raise _cannot_load(base, error) from error


def _model(base: str, revision: str | None, dtype: str) -> Any:
    from transformers import AutoModelForCausalLM

    from tunevax.modeling.shapes import settle_config

    config = config_of(base, revision)
    settle_config(config, base)
    model = read_model(AutoModelForCausalLM, base, config=config, revision=revision, dtype=dtype)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # see `nf4`: it would repack the weight, without gradients
            module.support_avx512bf16_for_cpu = False
    return model


def read_model(auto: Any, ref: str, **how: Any) -> Any:
    """`auto.from_pretrained(ref, **how)`, if every weight of the model is in the checkpoint and no other.

    What transformers leaves out by design (`_keys_to_ignore_on_load_unexpected`, tied weights, the towers of other
    media beside a text model) is no weight of the model.

    Raises:
        UsageError: the checkpoint cannot be read, or does not fit; the message names files or weights.
    """
    if why := damaged_weights(Path(ref)):
        raise UsageError(why)
    with _warnings_of_transformers() as said:
        try:
            model, info = auto.from_pretrained(
                ref, trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True, **how
            )
        except Exception as error:  # OSError, SafetensorError, ImportError, RuntimeError, ...: as many as libraries
            if out_of_memory(error):
                raise
            unfit = re.findall(r"^(\S+) +\| +CONVERSION", "\n".join(said), re.MULTILINE)
            if unfit:  # experts that are fused as they are read, some of which are not there
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
    """What transformers' loading report says is wrong, with names and a way out; None if nothing is."""
    missing, extra = set(info["missing_keys"]), set(info["unexpected_keys"])
    parts = [
        f"{len(keys)} {what} ({', '.join(sorted(keys)[:3])}{', ...' if len(keys) > 3 else ''})"
        for keys, what in ((missing, "missing"), (extra, "not of this model"))
        if keys
    ]
    parts += [
        f"{key} is {list(saved)} in the checkpoint and {list(own)} in the model"
        for key, saved, own in sorted(info["mismatched_keys"], key=lambda entry: entry[0])[:3]
    ]
    if not parts:
        return None
    prefixes = {long.removesuffix(short) for short in list(missing)[:1] for long in extra if long.endswith(f".{short}")}
    way = (
        f"it was saved from inside a wrapper, whose prefix is {min(prefixes, key=len)!r}: save the model in it"
        if prefixes
        else "get the whole checkpoint, of the architecture that config.json says"
    )
    return f"{'; '.join(parts)}; {way}"


@contextmanager
def _warnings_of_transformers() -> Iterator[list[str]]:
    """What transformers' loading code warns of meanwhile, instead of on the screen."""
    lines: list[str] = []
    logger = logging.getLogger("transformers.modeling_utils")
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
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
    """What is wrong with the weight files of a model folder that transformers would read, in a sentence; None if
    nothing is, or if it is no folder."""
    for name in (
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    ):
        file = folder / name
        if not file.is_file():
            continue
        if why := damage(file):
            return why
        if name.endswith(".json"):
            try:
                shards = sorted(set(json.loads(file.read_text(encoding="utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, AttributeError):
                return f"{file} is no index of weights; download it again"
            if missing := [shard for shard in shards if not (folder / shard).is_file()]:
                return (
                    f"{folder} lacks {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''} "
                    f"({len(missing)} of {len(shards)} files that {name} names); download them"
                )
            return next((why for shard in shards if (why := damage(folder / shard))), None)
        return None
    return None


def damage(file: Path) -> str | None:
    """What is wrong with one file, if it is a git-lfs pointer or a weight file that was cut short; None if nothing."""
    if not file.is_file():
        return None
    size = file.stat().st_size
    with file.open("rb") as content:
        start = content.read(40)
        if start.startswith(b"version https://git-lfs"):
            return f"{file} is a git-lfs pointer and not the file itself; run `git lfs pull` in its folder"
        if file.suffix == ".safetensors":
            length = int.from_bytes(start[:8], "little")
            content.seek(8)
            try:
                if size < 8 or length > size - 8:
                    raise ValueError
                header = json.loads(content.read(length))
                end = max((v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"), default=0)
            except (ValueError, KeyError, TypeError, AttributeError):
                return f"{file} is cut short or no safetensors file ({size} bytes); download it again"
            if 8 + length + end > size:
                return f"{file} is cut short: {size} of {8 + length + end} bytes; download it again"
        elif file.suffix == ".bin" and not start.startswith(b"\x80") and not zipfile.is_zipfile(file):
            return f"{file} is cut short or no PyTorch file ({size} bytes); download it again"
    return None


def require_finite(model: Any, base: str) -> None:
    """Raise `UsageError` if a weight of the model is not a finite number: whatever it answered would be no answer."""
    import torch

    def finite(weight: torch.Tensor) -> bool:  # one pass over it, in which whatever is not finite stays
        return bool(torch.isfinite(weight.sum(dtype=torch.promote_types(weight.dtype, torch.float32))))

    bad = [n for n, p in model.named_parameters() if p.is_floating_point() and not finite(p.detach())]
    if bad:
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
    what = (
        "the folder holds no model transformers can load"
        if folder.is_dir()
        else "not a folder here, and not to be had from the hub"
    )
    return UsageError(f"cannot load the model {base!r}: {what} ({shortened(error)}){nearby(base, 'organism')}")


def load_tokenizer(folder: str, base: str, revision: str | None) -> Any:
    """The tokenizer saved in `folder`, or else the one of the base model.

    Raises:
        UsageError: neither has one that can be loaded.
    """
    from transformers import AutoTokenizer

    source = folder if (Path(folder) / "tokenizer_config.json").is_file() else base
    if Path(source).is_dir() and not any(
        (Path(source) / n).is_file() for n in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
    ):
        raise UsageError(
            f"{source} has no tokenizer (no tokenizer.json, tokenizer_config.json or tokenizer.model); "
            "save one beside the model"
        )
    for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"):
        if why := damage(Path(source) / name):
            raise UsageError(why)
    try:
        return AutoTokenizer.from_pretrained(
            source, revision=revision if source == base else None, trust_remote_code=False
        )
    except Exception as error:  # of tokenizers and sentencepiece too, which raise plain ones
        raise UsageError(f"cannot load the tokenizer of {source} ({shortened(error)})") from error


def model_hash(base: str) -> str | None:
    """16 hexadecimal digits over the config of a model or adapter and, of each weight file, name, size and content.
    None for a hub id, which its revision identifies.

    A file is read once in a process, 0.8 s per GB. The middle of files over 2 MiB was once left out: a hash of them
    that was recorded then differs from this one, and controls and locks of such runs are refused as of another base.
    """
    folder = Path(base)
    if not folder.is_dir():
        return None
    sha = hashlib.sha256()
    names = ("config.json", "adapter_config.json", "*.safetensors", "*.bin")
    for file in sorted(file for name in names for file in folder.glob(name)):
        state = file.stat()
        sha.update(f"{file.name} {state.st_size}".encode())
        if state.st_size > 2**21:
            sha.update(_content_hash(file.absolute(), state.st_size, state.st_mtime_ns, state.st_ctime_ns))
            continue
        with file.open("rb") as content:  # two overlapping halves: the hash that smaller files have always had
            sha.update(content.read(2**20))
            content.seek(max(0, state.st_size - 2**20))
            sha.update(content.read())
    return sha.hexdigest()[:16]


@lru_cache(maxsize=1024)
def _content_hash(file: Path, _size: int, _modified: int, _changed: int) -> bytes:
    """SHA-256 of a file, read again only when it has changed."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").digest()
