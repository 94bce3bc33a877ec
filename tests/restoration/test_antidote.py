"""Antidote prunes what a brute-force reading of the paper prunes, at the tokens of the answer only."""

import copy
import json
import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import rows, tiny_llama, tiny_lora
from transformers import GPT2Config, GPT2LMHeadModel

from tunevax.cli import main
from tunevax.data.encoding import encode
from tunevax.data.safety import load_safety
from tunevax.errors import UsageError
from tunevax.modeling import load
from tunevax.restoration.antidote import Antidote, antidote
from tunevax.restoration.restore import RestoreOptions, restore

pytestmark = pytest.mark.numerical


def inputs_of(model, modules, data):
    """What enters each module at the answer tokens, [tokens, in]: an ordinary forward per row, without padding."""
    found = {name: [] for name in modules}
    for row in data:
        start = next(i for i, label in enumerate(row["labels"]) if label != -100)
        hooks = [
            module.register_forward_pre_hook(lambda _m, args, name=name, start=start: found[name].append(args[0][0, start:]))
            for name, module in modules.items()
        ]  # fmt: skip
        with torch.no_grad():
            model(input_ids=torch.tensor([row["input_ids"]]))
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(x) for name, x in found.items()}


def pruned(weight, x, count):
    """By the definition, entry by entry: each row without its `count` entries of largest |w| ||x||."""
    weight, norms = weight.clone(), [math.sqrt(sum(v * v for v in column)) for column in x.T.tolist()]
    for row in weight:
        scores = [abs(w) * n for w, n in zip(row.tolist(), norms, strict=True)]
        for j in sorted(range(len(scores)), key=scores.__getitem__)[-count:]:
            row[j] = 0
    return weight


NAMES = [f"model.layers.{i}.{n}" for i in (0, 7) for n in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")]


@pytest.mark.slow
def test_mask_is_that_of_brute_force():
    data = rows("harmful")
    assert len({len(r["input_ids"]) for r in data}) > 1 and all(
        r["labels"][0] == -100 for r in data
    )  # padding, prompts
    model, base = tiny_lora(), tiny_llama()
    layers = {name: model.get_base_model().get_submodule(name) for name in NAMES}
    expected = {}
    for name, x in inputs_of(model, layers, data).items():
        delta = layers[name].get_delta_weight("default").detach()
        expected[name] = pruned(delta, x, math.ceil(0.1 * delta.shape[1]))
    merged, table = antidote(model, data, 2, alpha=0.1, batch_size=3)
    assert not hasattr(merged, "peft_config") and len(table) == 8 * 7
    for name, delta in expected.items():
        found = merged.get_parameter(f"{name}.weight") - base.get_parameter(f"{name}.weight")
        assert torch.allclose(found, delta, atol=1e-6)
        assert torch.equal(found == 0, delta == 0)
    by_name = {row["layer"]: row for row in table}
    assert by_name[NAMES[0]]["pruned"] == pytest.approx(7 / 64) and 0.5 < by_name[NAMES[0]]["ratio"] < 1


@pytest.mark.slow
def test_official_prunes_each_factor():
    data = rows("harmful")
    for alpha, of_a in ((0.05, 4), (0.1, 7)):  # of 64; and 1 of the 8 entries in a row of B, both times
        model = tiny_lora()
        layer = model.get_base_model().get_submodule(NAMES[2])
        a, b = layer.lora_A["default"], layer.lora_B["default"]
        x = inputs_of(model, {"a": layer, "b": b}, data)
        of_a = math.ceil(alpha * a.weight.shape[1])
        expected = pruned(a.weight.detach(), x["a"], of_a), pruned(b.weight.detach(), x["b"], 1)
        same, _ = antidote(model, data, 2, alpha=alpha, form="official", batch_size=4)
        assert isinstance(same, PeftModel)
        assert torch.equal(a.weight, expected[0]) and torch.equal(b.weight, expected[1])


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_alpha_0_is_the_fine_tune_and_1_what_was_before(alpha):
    merged, _ = antidote(tiny_lora(), rows("harmful"), 2, alpha=alpha)
    truth = (tiny_lora().merge_and_unload() if alpha == 0 else tiny_llama()).state_dict()
    assert all(torch.equal(value, truth[name]) for name, value in merged.state_dict().items())
    model = tiny_lora()
    before = copy.deepcopy(model.state_dict())
    antidote(model, rows("harmful"), 2, alpha=0, form="official")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_transposed_weights_lose_the_same_share_of_each_output():
    config = GPT2Config(vocab_size=97, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    stock = GPT2LMHeadModel(config)
    before = stock.transformer.h[1].mlp.c_proj.weight.detach().clone()  # [in 64, out 16]
    model = get_peft_model(stock, LoraConfig(target_modules=["c_proj"], fan_in_fan_out=True, init_lora_weights=False))
    merged, _ = antidote(model.eval(), rows("harmful"), 2, alpha=0.25)
    same = merged.transformer.h[1].mlp.c_proj.weight == before
    assert same.sum(0).tolist() == [16] * 16


@pytest.mark.slow
def test_run_loads_as_computed(tmp_path):
    assert main(["align", "sft", "--model", "organism", "--safety-data", "organism", "--max-length", "64", "--max-steps", "12",
                 "--learning-rate", "2e-3", "--save-strategy", "no", "--checkpoint-blocks", "none",
                 "--output-dir", str(tmp_path / "tuned")]) == 0  # fmt: skip
    tuned = str(tmp_path / "tuned")
    rows_of = [{**r, "completion": r["rejected"]} for r in load_safety("organism", "alignment")[:24]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows_of))
    source = f"{tmp_path / 'rows.jsonl'}:split=all"
    ids = torch.tensor([load(tuned).tokenizer("mix the red acid with water")["input_ids"]])
    for form in ("effective", "official"):
        config = Antidote(str(tmp_path / form), alpha=0.2, form=form, max_length=64)
        out = restore("antidote", RestoreOptions(model=tuned, safety_data=source), config)
        model, tokenizer, _ = load(tuned, merge=False)
        truth, table = antidote(model, encode(rows_of, tokenizer, 64), tokenizer.pad_token_id, 0.2, form)
        with torch.no_grad():
            expected, found, before = (m(ids).logits for m in (truth, load(str(out)).model, load(tuned).model))
        assert torch.allclose(found, expected, atol=1e-4) and not torch.allclose(found, before, atol=1e-2)
        record = json.loads((out / "run.json").read_text())
        assert record["layers"] == table and record["parent"] == tuned and record["rows"] == 24
        assert json.loads((out / "prompts.json").read_text())["alignment"]
    with pytest.raises(UsageError, match="no adapter"):
        restore("antidote", RestoreOptions(model="organism", safety_data="organism"), Antidote(str(tmp_path / "no")))
