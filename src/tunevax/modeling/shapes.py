"""Checks of a model and its tokenizer before training, by one small forward pass."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tunevax.data.chat import chat_of
from tunevax.errors import UsageError
from tunevax.modeling.blocks import CALLED, Block, embedding, find_final_norm, plain_tokens, unwrap
from tunevax.modeling.hooks import Prefix, attached, still, tensor_of, without_dropout
from tunevax.modeling.loss import last_hidden, logits_of
from tunevax.modeling.precision import wide

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

TOKENS = 6  # of a row of the probe


def require_language_model(model: nn.Module, blocks: Sequence[Block] = (), parts: Sequence[str] = ()) -> None:
    """Run two short rows through `model`, and raise `UsageError` unless it behaves as tunevax expects.

    Its logits follow from the head's input as `logits_of` has it; no token sees those behind it; and each of `blocks`
    takes hidden states [batch, tokens, hidden], and has each of `parts` (fields of `Block`, `module` for the block
    itself) run once, with such an output; an MLP's may be flattened to [batch x tokens, hidden]. With `norm` among the
    parts, the head is given what the final norm gives.
    """
    stock = unwrap(model)
    name, head, embedding = type(stock).__name__, stock.get_output_embeddings(), stock.get_input_embeddings()
    if head is None or embedding is None:
        raise UsageError(f"{name} has no {'head' if head is None else 'embedding'} of its own; take a causal model")
    if any(p.is_meta for p in model.parameters()):
        return
    ids = probe_ids(stock)
    calls: dict[tuple[int, str], list[Any]] = defaultdict(list)
    heads: list[torch.Tensor] = []

    def ran(key: tuple[int, str], _module: nn.Module, _args: tuple, output: torch.Tensor | tuple) -> None:
        calls[key].append(tensor_of(output))

    def entered(key: tuple[int, str], _module: nn.Module, args: tuple, kwargs: dict) -> None:
        calls[key].append(args[0] if args else kwargs.get("hidden_states"))

    modules = {(i, part): getattr(b, part) for i, b in enumerate(blocks) for part in parts if part != "norm"}
    norm = {(0, "norm"): find_final_norm(model)} if "norm" in parts else {}
    inputs = {(i, "input"): block.module for i, block in enumerate(blocks)} if "module" in parts else {}
    handles = [m.register_forward_hook(partial(ran, key)) for key, m in {**modules, **norm}.items()]
    handles += [m.register_forward_pre_hook(partial(entered, key), with_kwargs=True) for key, m in inputs.items()]
    handles.append(head.register_forward_pre_hook(lambda _module, args: heads.append(args[0])))
    with attached(handles), torch.no_grad(), still(model):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    if len(heads) != 1 or heads[0].dim() != 3:
        raise UsageError(
            f"{name} does not give its head the hidden states of all tokens at once, so no loss can be taken; use a "
            "causal language model of transformers"
        )
    with torch.no_grad():
        ours = logits_of(stock, heads[0])
    # Rounding of one product; a cap that changes less does no harm either.
    slack = max(1e-4, 8 * torch.finfo(logits.dtype).eps) * max(logits.abs().max().item(), 1e-3)
    if ours.shape != logits.shape or not (ours - wide(logits)).abs().max().item() <= slack:
        raise UsageError(
            f"{name} does something to its logits behind its head that tunevax does not know (a scale, a cap or a "
            "cut), and every loss would be wrong; use another model, or report its class"
        )
    first = wide(logits[:, 0])
    loose = 1e-4 if logits.dtype in (torch.float32, torch.float64) else 0.05
    if (first[0] - first[1]).abs().max() > loose * first.abs().max():
        raise UsageError(
            f"{name} predicts a token from those behind it (an encoder, or is_decoder is false in its config); use a "
            "causal language model"
        )
    if norm and not (calls[0, "norm"] and torch.equal(calls[0, "norm"][-1], heads[0])):
        raise UsageError(
            f"between the final norm of {name} and its head something else is computed (a projection or a scale), so "
            "that no other depth can be read by norm and head; plain sft works without"
        )
    for i, part in [*inputs, *modules]:
        _require_states(name, i, part, calls[i, part], ids.shape, stock.config.get_text_config().hidden_size)


def probe_ids(stock: PreTrainedModel) -> torch.Tensor:
    """Two rows of token ids, [2, TOKENS], that differ but for the first one, with no special token among them."""
    plain = plain_tokens(stock)[:1000]
    row = [plain[(7 * i + 3) % len(plain)] for i in range(2 * TOKENS)]
    return torch.tensor([row[:TOKENS], row[:1] + row[TOKENS + 1 :]], device=embedding(stock).device)


def _require_states(
    name: str, i: int, part: str, seen: list[torch.Tensor | None], shape: torch.Size, hidden: int
) -> None:
    what = {"module": f"block {i}", "input": f"block {i}"}.get(part, f"the {CALLED.get(part)} of block {i}")
    rows, tokens = shape
    allowed = [(rows, tokens, hidden), *([(rows * tokens, hidden)] if part == "mlp" else [])]
    if len(seen) != 1 or not torch.is_tensor(seen[0]):
        why = f"runs {len(seen)} times in a forward pass" if len(seen) != 1 else "passes on no single tensor"
    elif tuple(seen[0].shape) not in allowed:
        verb = "takes" if part == "input" else "gives"
        why = f"{verb} a tensor {list(seen[0].shape)} for {rows} rows of {tokens} tokens and {hidden} dimensions"
    else:
        return
    raise UsageError(f"{what} of {name} {why}, which this method cannot work on; plain sft does not look into blocks")


def can_replay(model: nn.Module, blocks: Sequence[nn.Module]) -> bool:
    """Whether the blocks below any one can be left out of a second pass (`Prefix`), what enters that one being all that
    it and those above need of them. They need more where blocks share keys and values (Gemma 3n and 4)."""
    stock = unwrap(model)
    if any(p.is_meta for p in model.parameters()):
        return True
    ids = probe_ids(stock)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for start in sorted({1, len(blocks) // 2, len(blocks) - 1} - {0, len(blocks)}):
        prefix = Prefix(blocks, start)
        try:
            with torch.no_grad(), without_dropout([model]):
                with prefix.record():
                    first = last_hidden(model, inputs)
                with prefix.replay():
                    second = last_hidden(model, inputs)
        except Exception:  # of any kind: an input that a block needs is missing
            return False
        if not torch.equal(first, second):
            return False
    return True


def settle_config(config: PreTrainedConfig, base: str) -> None:
    """Remove a padding token beyond the embedding, for transformers; a `UsageError` for an encoder-decoder model."""
    if getattr(config, "is_encoder_decoder", False):
        raise UsageError(
            f"{base} is an encoder-decoder model ({type(config).__name__}), and tunevax takes causal language models, "
            "which are decoders alone, such as Llama"
        )
    for part in (config, config.get_text_config()):
        pad, rows = getattr(part, "pad_token_id", None), getattr(part, "vocab_size", None)
        if pad is not None and rows is not None and pad >= rows:
            part.pad_token_id = None


def settle_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase, ref: str) -> None:
    """Give `tokenizer` a token that ends an answer and one to pad with, both with a row in the model's embedding.

    A missing end token is what the chat template puts after an answer, if that is a special token, or else what the
    generation config or the config names. A padding token that is missing, or was added to the tokenizer and not to the
    model, becomes the end token: padding is masked by position, not by token. `ids_of` refuses texts with other tokens
    beyond the embedding. Raises `UsageError` if nothing ends an answer.
    """
    stock = unwrap(model)
    rows = len(embedding(stock))
    if max(tokenizer.get_vocab().values(), default=0) >= rows:
        tokenizer.embedding_rows = rows
    if not _has_row(tokenizer.eos_token_id, rows):
        special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        behind = tokenizer(chat_of(tokenizer).ending, add_special_tokens=False)["input_ids"]
        candidates = [i for i in behind if i in special]
        for config in (stock.generation_config, stock.config, stock.config.get_text_config()):
            ends = getattr(config, "eos_token_id", None)
            candidates += ends if isinstance(ends, list | tuple) else [ends]
        known = [i for i in candidates if _has_row(i, rows) and tokenizer.convert_ids_to_tokens(i)]
        if not known:
            raise UsageError(
                f"nothing ends an answer of {ref}: its tokenizer and its config name no eos_token that the model has "
                f"(its embedding has {rows} rows), and its chat template puts no special token behind an answer; set "
                "eos_token in tokenizer_config.json"
            )
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(known[0])
    if not _has_row(tokenizer.pad_token_id, rows):
        tokenizer.pad_token = tokenizer.eos_token


def _has_row(token: int | None, rows: int) -> bool:
    return token is not None and 0 <= token < rows
