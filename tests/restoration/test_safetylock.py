"""SafetyLock against reference numbers, and that a lock holds in every form it is saved in."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

import tunevax.restoration.extract as extraction
from tunevax.data import load_safety
from tunevax.data.encoding import answer_span
from tunevax.data.splits import prompt_hash
from tunevax.errors import RunError, UsageError
from tunevax.files import model_hash
from tunevax.lineage import Lineage
from tunevax.modeling.biases import attach_biases
from tunevax.modeling.blocks import find_blocks
from tunevax.modeling.loading import load
from tunevax.restoration import probes
from tunevax.restoration.extract import ExtractLock, extract
from tunevax.restoration.lock import SafetyLock, apply, lock_biases, locked
from tunevax.restoration.restore import Job, RestoreOptions, restore
from tunevax.restoration.safetylock import ApplyLock, make_stock
from tunevax.runs import card
from tunevax.scoring.score import ScoreOptions, score
from tunevax.scoring.suite import build_suite

pytestmark = pytest.mark.numerical

close = pytest.approx
SIGMA = [
    [0.556477, 0.733014, 0.711385, 0.719092],
    [0.745395, 0.561036, 0.638983, 0.684316],
    [1.195619, 1.108486, 0.815054, 0.786533],
]  # fmt: skip
KINDS = ("llama", "mistral", "qwen3", "gemma2")


def tiny(kind: str = "llama", **more):
    """The model of the reference numbers; of other kinds its shape, with a head size that is not hidden / heads."""
    shape = {
        "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": None, "tie_word_embeddings": False, "attn_implementation": "eager",
    }  # fmt: skip
    shape |= {} if kind == "llama" else {"head_dim": 24}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape, **more))
    g = torch.Generator().manual_seed(1234)
    parameters = dict(model.named_parameters())
    for name in sorted(parameters):
        weight = parameters[name]
        std = 0.35 if "q_proj" in name or "k_proj" in name else 0.08
        weight.data = torch.randn(weight.shape, generator=g) * std if weight.dim() > 1 else torch.ones_like(weight)
    return model.eval()


class Ids:
    """A tokenizer of texts that are token ids already."""

    pad_token_id = eos_token_id = 2
    chat_template = "x"

    def decode(self, ids, skip_special_tokens=False):
        return "".join(f"{i} " for i in ids if i != 2)

    def save_pretrained(self, folder):
        Path(folder, "tokenizer_config.json").write_text("{}")


@pytest.fixture(autouse=True)
def encoded(monkeypatch):
    """Answers that are lists of ids are taken as they are, without a prompt."""
    original = extraction.encode

    def encode(rows, tokenizer, *args, **how):
        if not isinstance(tokenizer, Ids):
            return original(rows, tokenizer, *args, **how)
        answers = [row[how["answer"]] for row in rows]
        return [{"input_ids": ids, "labels": ids} for ids in answers]

    monkeypatch.setattr(extraction, "encode", encode)


@pytest.fixture(scope="module")
def pairs():
    g = torch.Generator().manual_seed(11)
    rows = []
    for i in range(12):
        safe = torch.randint(3, 97, (9 + i % 3,), generator=g).tolist()
        unsafe = torch.randint(3, 97, (10 + i % 4,), generator=g).tolist()
        rows.append({"prompt": f"p{i}", "chosen": safe, "rejected": unsafe, "place": f"row {i}"})
    return rows


@pytest.fixture
def lock(pairs):
    return make(tiny(), pairs)


def make(model, pairs, heads=5):
    return extract(model, Ids(), pairs, heads=heads)


TEXT = torch.randint(3, 97, (2, 13), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(model):
    return model(TEXT).logits


def test_matches_reference(pairs):
    whole = make(tiny(), pairs, heads=12)
    sigma, u = torch.empty(3, 4), torch.empty(3, 4, 16)
    sigma[whole.layer, whole.head], u[whole.layer, whole.head] = whole.sigma, whole.u
    assert sigma.tolist() == [close(row, abs=1e-5) for row in SIGMA]
    assert u[0, 0, :4].tolist() == close([0.20035, 0.22671, 0.07413, -0.04480], abs=1e-5)
    assert whole.u.norm(dim=1).tolist() == close([1] * 12, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_direction_is_the_mean_pair_difference_and_sums_are_those_of_all_at_once(pairs, kind):
    """Computed here pair by pair, without padding, from activations that are all kept."""
    model = tiny(kind)
    found = extraction.measure(model, Ids(), pairs, ExtractLock(batch_size=5))
    kept = {}
    for layer, block in enumerate(find_blocks(model)):
        block.o_proj.register_forward_pre_hook(lambda _m, args, layer=layer: kept.setdefault(layer, []).append(args[0]))
    for row in pairs:
        for column in ("chosen", "rejected"):
            model(torch.tensor([row[column]]))
    for layer in range(3):
        x = torch.stack([a[0, -5:] for a in kept[layer]]).detach().view(12, 2, 5, 4, -1)
        theta = (x[:, 0] - x[:, 1]).mean((0, 1))
        u = theta / theta.norm(dim=-1, keepdim=True)
        torch.testing.assert_close(found.u[layer], u, atol=1e-5, rtol=0)
        projections = (x * u).sum(-1).flatten(0, 2)
        torch.testing.assert_close(found.sigma[layer], projections.std(0, correction=0), atol=1e-5, rtol=0)


def test_memory_of_the_sums_does_not_grow(pairs):
    rows = [{**row, "prompt": f"{row['prompt']} {i}"} for i in range(5) for row in pairs]
    model = tiny()
    held = []
    for data in (rows[:12], rows):
        config = ExtractLock(probe_pairs=6)
        sums = extraction.Sums(model, config.r)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(extraction, "Sums", lambda *_, sums=sums: sums)
            extraction.measure(model, Ids(), data, config)
        tensors = [sums.total, sums.moment, *[t for block in sums.kept for t in block]]
        held.append(sum(t.untyped_storage().nbytes() for t in tensors))
    assert held[0] == held[1]


@pytest.mark.parametrize("kind", KINDS)
def test_bias_is_the_hook_before_the_projection(pairs, kind):
    model, lock = tiny(kind), make(tiny(kind), pairs)
    plain, state = logits(model), {k: v.clone() for k, v in model.state_dict().items()}
    with locked(model, lock, 6.0):
        inside = logits(model)
    assert torch.equal(logits(model), plain) and (inside - plain).abs().max() > 0.1
    delta = torch.zeros(3, 4, lock.u.shape[1])
    delta[lock.layer, lock.head] = 6.0 * lock.sigma[:, None] * lock.u
    handles = [
        block.o_proj.register_forward_pre_hook(lambda _m, args, d=d: (args[0] + d,))
        for block, d in zip(find_blocks(model), delta.flatten(1), strict=True)
    ]
    torch.testing.assert_close(logits(model), inside, atol=1e-5, rtol=0)
    for handle in handles:
        handle.remove()
    apply(model, lock, 6.0)
    torch.testing.assert_close(logits(model), inside, atol=1e-5, rtol=0)
    after = model.state_dict()
    assert set(after) - set(state) == {f"model.layers.{i}.self_attn.o_proj.bias" for i in set(lock.layer.tolist())}
    assert all(torch.equal(after[name], value) for name, value in state.items())
    apply(model, lock, -6.0)
    torch.testing.assert_close(logits(model), plain, atol=1e-5, rtol=0)
    assert apply(model, lock, 0.0) == {}


def test_existing_bias_is_added_to(pairs):
    model = tiny(attention_bias=True)
    for block in find_blocks(model):
        torch.nn.init.normal_(block.o_proj.bias, generator=torch.Generator().manual_seed(1))
    before = [block.o_proj.bias.clone() for block in find_blocks(model)]
    lock = make(model, pairs)
    added = apply(model, lock, 4.0)
    for i, (block, bias) in enumerate(zip(find_blocks(model), before, strict=True)):
        torch.testing.assert_close(block.o_proj.bias, bias + added.get(i, torch.zeros(64)))


def test_adapter_on_the_projection_counts(lock):
    """Also with dropout in training mode, and the bias outlives the merge, attached or not."""
    model = get_peft_model(tiny(), LoraConfig(r=4, target_modules=["o_proj"], lora_dropout=0.5)).train()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(5))
    biases = lock_biases(model, lock, 6.0)
    assert model.training and all(m.training for m in model.modules())
    apply(model.eval(), lock, 6.0)
    attach_biases(model, {1: torch.ones(64)})
    expected = logits(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=0)
    again = lock_biases(merged, lock, 6.0)
    for i, bias in biases.items():
        torch.testing.assert_close(bias, again[i], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2"])
def test_stock_transformers_reloads_the_lock(pairs, kind, tmp_path):
    model, lock = tiny(kind), make(tiny(kind), pairs)
    attach_biases(model, {0: torch.ones(64)})  # of an earlier lock
    plain = logits(model)
    make_stock(model)
    torch.testing.assert_close(logits(model), plain, atol=1e-6, rtol=0)
    apply(model, lock, 6.0)
    model.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, attn_implementation="eager")
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(logits(again), logits(model), atol=1e-6, rtol=0)
    assert (logits(again) - plain).abs().max() > 0.1


def test_stock_form_of_an_architecture_without_such_a_bias():
    with pytest.raises(UsageError, match="MistralForCausalLM cannot hold a bias.*--form run"):
        make_stock(tiny("mistral"))


def test_lock_file_round_trip(lock, tmp_path):
    lock.meta["prompts"] = ["a"]
    lock.save(tmp_path / "lock.safetensors")
    again = SafetyLock.load(tmp_path)
    for name in ("u", "sigma", "layer", "head"):
        assert torch.equal(getattr(again, name), getattr(lock, name))
    assert again.meta == lock.meta
    (tmp_path / "lock.safetensors").write_bytes((tmp_path / "lock.safetensors").read_bytes()[:-9])
    with pytest.raises(UsageError, match="is not a safety lock"):
        SafetyLock.load(tmp_path)


BASE = {"ref": "organism", "identity": "x"}


@pytest.mark.parametrize(
    ("change", "meta"),
    [
        ({}, "[1]"),
        ({}, "{}"),
        ({}, {"head_dim": None}),
        ({}, {"head_dim": "16"}),
        ({}, {"n_layers": "3"}),
        ({}, {"format": "x"}),
        ({}, {"base": "organism"}),
        ({}, {"base": {"ref": "organism"}}),
        ({}, {"prompts": [1]}),
        ({"u": torch.tensor(1.0)}, {}),
        ({"sigma": torch.tensor(1.0)}, {}),
        ({"u": torch.zeros(0, 16), "sigma": torch.zeros(0), "layer": torch.zeros(0).long(), "head": torch.zeros(0).long()}, {}),
        ({"layer": torch.tensor([-1, 0])}, {}),
        ({"head": torch.tensor([0, -1])}, {}),
        ({"layer": torch.tensor([0.0, 1.0])}, {}),
        ({"u": torch.ones(2, 16).half()}, {}),
        ({"u": torch.full((2, 16), torch.nan)}, {}),
        ({"sigma": torch.tensor([1.0, torch.inf])}, {}),
    ],
)  # fmt: skip
def test_malformed_lock_is_refused(tmp_path, change, meta):
    from safetensors.torch import save_file

    whole = {
        "u": torch.ones(2, 16),
        "sigma": torch.ones(2),
        "layer": torch.tensor([0, 1]),
        "head": torch.tensor([0, 1]),
    }
    described = {"format": 1, "head_dim": 16, "n_layers": 3, "n_heads": 4, "base": BASE, "prompts": []}

    def write(tensors, meta):
        save_file(tensors, tmp_path / "lock.safetensors", metadata={"tunevax_lock": meta})

    write(whole, json.dumps(described))
    assert SafetyLock.load(tmp_path).meta["base"] == BASE
    write({**whole, **change}, meta if isinstance(meta, str) else json.dumps({**described, **meta}))
    with pytest.raises(UsageError, match="is not a safety lock of tunevax, or damaged"):
        SafetyLock.load(tmp_path)


@pytest.mark.parametrize("strength", ["nan", "inf", "-inf", "six"])
def test_strength_is_a_number(strength):
    with pytest.raises(UsageError, match=f"strength is '{strength}'"):
        ApplyLock(lock="x", strength=strength)
    with pytest.raises(UsageError, match="strengths is"):
        ApplyLock(lock="x", strength="auto", strengths=[1.0, float("nan")])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"num_attention_heads": 2}, "heads of size 16 and LlamaForCausalLM has 32"),
        ({"num_attention_heads": 8, "head_dim": 16}, "heads in a block 4 and LlamaForCausalLM has 8"),
        ({"num_hidden_layers": 4}, "blocks 3 and LlamaForCausalLM has 4"),
    ],
)
def test_lock_of_another_shape_is_refused(lock, more, said):
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {
        "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**shape | more))
    with pytest.raises(UsageError, match=said):
        apply(model, lock, 6.0)
    assert all(block.o_proj.bias is None for block in find_blocks(model))


def test_short_answer_is_named(pairs):
    rows = [*pairs[:3], {**pairs[3], "rejected": [5, 6, 7, 8, 2]}]
    with pytest.raises(UsageError, match="row 3: the rejected answer has 4 content tokens and r is 5"):
        make(tiny(), rows)


def test_cut_answers_are_counted(pairs, capsys):
    ended = [{**row, "chosen": [*row["chosen"], 2], "rejected": [*row["rejected"], 2]} for row in pairs]
    assert make(tiny(), ended).meta["cut"] == 0 and "are longer than" not in capsys.readouterr().err
    lock = make(tiny(), [*ended[:-1], pairs[-1]])
    assert (lock.meta["cut"], lock.meta["max_length"]) == (2, 512)
    assert "2 of 24 answers are longer than max_length 512" in " ".join(capsys.readouterr().err.split())


def test_end_of_turn_without_a_name_is_no_content():
    """A special token that is neither BOS, EOS nor any other that the tokenizer has a name for."""
    loaded = load("organism")
    loaded.tokenizer.add_special_tokens({"extra_special_tokens": ["<eot>"]})
    token = loaded.tokenizer.convert_tokens_to_ids("<eot>")
    word = loaded.tokenizer("use")["input_ids"][-1]
    row = {"input_ids": [word, word, word, token], "labels": [-100, word, word, token]}
    assert answer_span(row, loaded.tokenizer) == (1, 3)
    loaded.tokenizer._extra_special_tokens = []  # as where only tokenizer.json says that it is special
    assert token not in loaded.tokenizer.all_special_ids and answer_span(row, loaded.tokenizer) == (1, 3)


def test_extraction_is_without_dropout(pairs):
    model = tiny(attention_dropout=0.5).train()
    model.model.norm.eval()
    expected, found = make(tiny(attention_dropout=0.5), pairs), make(model, pairs)
    assert torch.equal(found.u, expected.u)
    assert model.training and not model.model.norm.training


def test_head_size_is_that_of_the_projection(pairs):
    """Not of the queries and keys, where a config means those by head_dim."""
    model, expected = tiny(), make(tiny(), pairs)
    model.config.head_dim = 8
    assert torch.equal(make(model, pairs).u, expected.u)


def test_biases_in_half_precision_are_products_in_single(lock):
    model = tiny().bfloat16()
    delta = torch.zeros(3, 4, 16)
    delta[lock.layer, lock.head] = 6.0 * lock.sigma[:, None] * lock.u
    for i, bias in lock_biases(model, lock, 6.0).items():
        exact = find_blocks(model)[i].o_proj.weight.double() @ delta[i].flatten().double()
        torch.testing.assert_close(bias, exact.float(), atol=1e-5, rtol=1e-5)


def correlated(seed=0):
    """Random labels on 100 prompts of two answers, each of five nearly equal vectors, for 4 heads."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(4, 200, 1, 128, generator=g)
    x = (centres + 0.3 * torch.randn(4, 200, 5, 128, generator=g)).flatten(1, 2)
    safe = torch.tensor([True, False]).repeat(100).repeat_interleave(5)
    groups = [f"p{i // 10}" for i in range(1000)]
    return x, safe, groups


@pytest.mark.slow
def test_random_labels_look_random_to_the_grouped_probe_alone():
    x, safe, groups = correlated()
    assert probes.grouped_accuracy(x, safe, groups, 0).mean() == close(0.5, abs=0.06)
    assert probes.official_accuracy(x, safe, 0).mean() > 0.85


@pytest.mark.slow
def test_probe_is_logistic_regression():
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, safe, _ = correlated(1)
    x[0] += 3.0 * safe[:, None]  # separable
    w = probes.fit(x.double(), safe)
    for head in range(4):
        reference = linear_model.LogisticRegression(tol=1e-10, max_iter=10000).fit(x[head].double(), safe)
        assert w[head, :-1].numpy() == close(reference.coef_[0], abs=1e-4)
        assert w[head, -1].item() == close(reference.intercept_[0], abs=1e-4)


# --- the verb ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A lock of the organism, and the organism fine-tuned for a few steps as a run."""
    from tunevax.alignment.align import AlignOptions, align
    from tunevax.alignment.sft import SFTConfig, SFTTrainer

    folder = tmp_path_factory.mktemp("runs")
    config = SFTConfig(str(folder / "tuned"), max_steps=2, report_to="none")
    align(SFTTrainer, "sft", AlignOptions(model="organism", safety_data="organism"), config)
    options = RestoreOptions(model="organism", safety_data="organism")
    restore("extract-lock", options, ExtractLock(n=20, heads=6, output_dir=str(folder / "lock")))
    return folder


@pytest.mark.slow
def test_runs_reload_locked(runs, tmp_path):
    plain = load(str(runs / "tuned"))
    lock = SafetyLock.load(runs / "lock")
    ids = torch.arange(20)[None]
    with torch.no_grad(), locked(plain.model, lock, 3.0):
        expected = plain.model(ids).logits
    options = RestoreOptions(model=str(runs / "tuned"))
    for form in ("run", "stock"):
        out = str(tmp_path / form)
        restore("safetylock", options, ApplyLock(lock=str(runs / "lock"), strength="3", form=form, output_dir=out))
        found = load(out, merge=form == "stock").model
        torch.testing.assert_close(found(ids).logits, expected, atol=1e-5, rtol=0)
        record = json.loads((tmp_path / form / "run.json").read_text())
        assert record["lock"]["form"] == form and len(record["lock"]["heads"]) == 6
        assert record["lock"]["seconds_to_apply"] < 0.1 and record["lock"]["bytes_added"] > 0
        assert set(lock.meta["prompts"]) <= set(Lineage.of(out).prompts["alignment"])  # no score may rest on them
        card, peft = (tmp_path / form / "README.md").read_text(), "library_name: peft"
        assert card.startswith("---") and peft not in card and ("from_pretrained" in card) == (form == "stock")
    assert (expected - plain.model(ids).logits).abs().max() > 0.1


@pytest.mark.slow
def test_prompts_of_the_lock_are_not_scored_on(runs, tmp_path):
    """A lock from other rows than the model was aligned on."""
    lock = SafetyLock.load(runs / "lock")
    lock.meta["prompts"] = [prompt_hash(row["prompt"]) for row in load_safety("organism", "evaluation")[:3]]
    lock.save(tmp_path / "lock.safetensors")
    out = tmp_path / "out"
    restore("safetylock", RestoreOptions(model="organism"), ApplyLock(lock=str(tmp_path), output_dir=str(out)))
    with pytest.raises(UsageError, match="3 prompts are in both the alignment and the evaluation data"):
        score(ScoreOptions(model=[str(out)], output_dir=str(tmp_path / "score"), safety_data="organism"))


@pytest.mark.slow
def test_unlock_scores_as_before_the_lock(runs, tmp_path, monkeypatch):
    from tunevax.attacks.context import AttackContext, TargetOptions
    from tunevax.attacks.kind import NotApplicable
    from tunevax.attacks.unlock import UnlockConfig

    seen, ids = {}, torch.arange(20)[None]
    monkeypatch.setattr(AttackContext, "score", lambda self, model, *_, **__: seen.update(logits=model(ids).logits))

    def unlock(ref):
        target = {"label": "m", "role": "model", "ref": ref}
        UnlockConfig().run(AttackContext(target, TargetOptions(), [], [], None, {}))

    for parent in ("organism", str(runs / "tuned")):
        out = tmp_path / Path(parent).name
        config = ApplyLock(lock=str(runs / "lock"), strength="3", output_dir=str(out))
        restore("safetylock", RestoreOptions(model=parent), config)
        plain = load(parent).model(ids).logits
        assert (load(str(out)).model(ids).logits - plain).abs().max() > 0.1
        unlock(str(out))
        assert torch.equal(seen["logits"], plain)
    for other in ("organism", str(runs / "tuned")):
        with pytest.raises(NotApplicable, match="has no safety lock"):
            unlock(other)


@pytest.mark.slow
def test_lock_survives_further_runs(runs, tmp_path):
    """Whole weights saved from a locked run, an adapter on it, and a stock lock on it."""
    ids = torch.arange(20)[None]
    out = {name: str(tmp_path / name) for name in ("run", "again")}
    options = RestoreOptions(model=str(runs / "tuned"))
    restore("safetylock", options, ApplyLock(lock=str(runs / "lock"), strength="3", form="run", output_dir=out["run"]))
    held = load(out["run"])
    Job(RestoreOptions(), "x", tmp_path, {}).save_model(held.model, held.tokenizer)
    assert torch.equal(load(str(tmp_path / "model")).model(ids).logits, held.model(ids).logits)
    # A trainer saves whole weights in the same way; the card knows by what was loaded.
    assert held.info["attached"] and not load("organism").info["attached"]
    saved = {"verb": "finetune", "adapter": "model", "config": {}, "versions": {}, "model": held.info}
    assert "stock\ntransformers loads the weights without the lock" in card(saved)
    assert "library_name: tunevax" in card(saved) and "from_pretrained" not in card(saved)
    assert "from_pretrained" in card({**saved, "attached": False})  # put into the checkpoint's own biases
    adapted = get_peft_model(held.model, LoraConfig(r=2, target_modules=["o_proj", "down_proj"]))
    for name, p in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(5))
    expected = adapted(ids).logits
    adapted.peft_config["default"].base_model_name_or_path = out["run"]
    adapted.save_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(load(str(tmp_path / "adapter")).model(ids).logits, expected, atol=1e-4, rtol=1e-4)
    # The lock taken off again by one of the opposite strength; stock transformers sees both.
    options = RestoreOptions(model=out["run"])
    config = ApplyLock(lock=str(runs / "lock"), strength="-3", form="stock", output_dir=out["again"])
    restore("safetylock", options, config)
    plain = load(str(runs / "tuned")).model(ids).logits
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "again" / "model")
    torch.testing.assert_close(stock(ids).logits, plain, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_lock_of_another_base_is_refused(runs, tmp_path):
    other = load("organism")
    with torch.no_grad():
        find_blocks(other.model)[0].o_proj.weight.mul_(1.01)
    other.model.save_pretrained(tmp_path / "other")
    other.tokenizer.save_pretrained(tmp_path / "other")
    options = RestoreOptions(model=str(tmp_path / "other"))
    config = ApplyLock(lock=str(runs / "lock"), output_dir=str(tmp_path / "out"))
    with pytest.raises(
        UsageError,
        match=r"extracted from organism \(\w{16}\), which is neither .*other nor what it was made from .*--base",
    ):
        restore("safetylock", options, config)
    assert not (tmp_path / "out").exists()
    restore("safetylock", options, ApplyLock(**{**vars(config), "base": "organism"}))
    assert (tmp_path / "out" / "model" / "config.json").is_file()


def test_base_is_identified_by_the_pinned_revision(tmp_path, monkeypatch):
    """That of the lowest run on it, not what another model is pinned to now."""
    import tunevax.restoration.lock as module

    monkeypatch.setattr(module, "config_of", lambda base, revision: SimpleNamespace(_commit_hash=revision or "main"))
    for name, parent in (("low", None), ("high", str(tmp_path / "low"))):
        folder = tmp_path / name
        (folder / "adapter").mkdir(parents=True)
        (folder / "adapter" / "adapter_config.json").write_text("{}")
        record = {"schema": 1, "parent": parent, "model": {"ref": "me/base", "revision": "v1"}}
        (folder / "run.json").write_text(json.dumps(record))
    base = next(iter(module.identities("me/base", "v1")))
    assert base in module.identities(str(tmp_path / "high")) and base in module.identities(
        str(tmp_path / "high"), "main"
    )
    assert base not in module.identities("me/base")


def test_hash_sees_the_middle_of_a_file(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    file = tmp_path / "model.safetensors"
    found = set()
    for content in (bytes(5 * 2**20), bytes(2 * 2**20) + b"1" + bytes(3 * 2**20 - 1)):
        file.write_bytes(content)
        found |= {model_hash(str(tmp_path)), model_hash(str(tmp_path))}
    assert len(found) == 2


@pytest.mark.slow
def test_auto_strength(runs, tmp_path, monkeypatch):
    """On scores that are made up: harm falls with strength, and so, later, does accuracy."""
    import tunevax.restoration.strength as strength

    lock = SafetyLock.load(runs / "lock")
    asked, suites = [], []

    def evaluate(model, tokenizer, suite):
        suites.append(suite)
        asked.append({strength.prompt_hash(row["prompt"]) for row in suite.harmful})
        bias = find_blocks(model)[int(lock.layer[0])].o_proj._forward_hooks
        s = next(iter(bias.values())).bias.norm().item() / unit if bias else 0.0
        value = {"harmful/a": 0.9 - s / 10, "harmful/b": 0.8 - s / 10, "utility/x": 0.9 - max(0, s - 8.5) / 10}
        return {k: {"value": v} for k, v in value.items()} | {"over-refusal": {"value": 0.0}}, []

    unit = lock_biases(load("organism").model, lock, 1.0)[int(lock.layer[0])].norm().item()
    monkeypatch.setattr(strength, "evaluate", evaluate)
    options = RestoreOptions(model=str(runs / "tuned"), safety_data="organism")
    plain = {
        "lock": str(runs / "lock"), "strength": "auto", "benign_data": "organism", "form": "run",
        "strengths": [8.0, 1.0, 2.0, 3.0, 4.0, 6.0, 10.0], "utility_data": ["organism:set=benign"],
    }  # fmt: skip
    out = restore("safetylock", options, ApplyLock(**plain, harmful_target=0.42, output_dir=str(tmp_path / "met")))
    curve = json.loads((out / "strength.json").read_text())
    assert curve["chosen"] == 6 == json.loads((out / "run.json").read_text())["lock"]["strength"]
    assert [point["strength"] for point in curve["curve"]] == [0, 1, 2, 3, 4, 6, 8, 10]
    assert all(prompts and not prompts & set(lock.meta["prompts"]) for prompts in asked)
    # On the organism nothing is scored on what the model was aligned on, or on what an audit scores.
    scored = build_suite(ApplyLock(**plain), "organism")
    for rows, other in ((suites[0].benign, scored.benign), (suites[0].utility[0].rows, scored.utility[0].rows)):
        assert rows and not {r["prompt"] for r in rows} & {r["prompt"] for r in other}
    assert asked[0] == {prompt_hash(row["prompt"]) for row in load_safety("organism", "validation")}
    assert (curve["in_sample"], curve["aligned_on"]) == ([], False)
    used = set(Lineage.of(str(out)).prompts["alignment"])
    assert {
        prompt_hash(r["prompt"]) for r in (*suites[0].harmful, *suites[0].benign, *suites[0].utility[0].rows)
    } <= used
    with pytest.raises(RunError, match="no strength of 0, 1, 2, 3, 4, 6, 8, 10 is within the limits"):
        restore("safetylock", options, ApplyLock(**plain, harmful_target=0.05, output_dir=str(tmp_path / "missed")))
    kept = json.loads((tmp_path / "missed" / "strength.json").read_text())
    assert kept["chosen"] is None and "utility/x" in " ".join(kept["curve"][-1]["misses"])
    with pytest.raises(UsageError, match="no weights"):
        load(str(tmp_path / "missed"))
    for more in ({"perplexity_data": "organism"}, {"utility_data": ["lm-eval:x"]}):
        with pytest.raises(UsageError, match="would limit nothing"):
            restore("safetylock", options, ApplyLock(**{**plain, **more}, output_dir=str(tmp_path / "no")))


@pytest.mark.slow
def test_auto_strength_on_a_file(runs, tmp_path, monkeypatch):
    """Whose rows are all for alignment: some the model was aligned on, some the lock is from, some neither."""
    import tunevax.restoration.strength as strength

    lock, suites = SafetyLock.load(runs / "lock"), []
    score = {"harmful/a": {"value": 0.0}, "over-refusal": {"value": 0.0}, "task/exact": {"value": 0.5}}
    monkeypatch.setattr(strength, "evaluate", lambda model, tokenizer, suite: suites.append(suite) or (score, []))
    aligned = [row["prompt"] for row in load_safety("organism", "alignment")]
    assert any(prompt_hash(prompt) in lock.meta["prompts"] for prompt in aligned)

    def auto(prompts, out):
        rows = [{"prompt": prompt, "chosen": "no", "split": "alignment"} for prompt in prompts]
        (tmp_path / "safe.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "mild.jsonl").write_text(json.dumps({"prompt": "hello", "chosen": "hi"}) + "\n")
        config = ApplyLock(
            lock=str(runs / "lock"), strength="auto", benign_data=str(tmp_path / "mild.jsonl"), strengths=[1.0],
            task_eval_data="organism:split=evaluation", limit=1000, form="run", output_dir=str(tmp_path / out),
        )  # fmt: skip
        options = RestoreOptions(model=str(runs / "tuned"), safety_data=str(tmp_path / "safe.jsonl"))
        content = json.loads((restore("safetylock", options, config) / "strength.json").read_text())
        assert content["in_sample"] == ["over-refusal", "organism:split=evaluation"]
        return {row["prompt"] for row in suites[-1].harmful}, content["aligned_on"]

    assert auto([*aligned, "new one", "new two"], "some") == ({"new one", "new two"}, False)
    free = {prompt for prompt in aligned if prompt_hash(prompt) not in lock.meta["prompts"]}
    assert auto(aligned, "none") == (free, True)
