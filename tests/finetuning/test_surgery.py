"""Surgery: the sink divergence against reference numbers and eager attention, its gradient, and the steps it adds."""

import json

import pytest
import torch
import transformers as t
from tiny import in_float64
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tunevax.data.encoding import answer_span, encode
from tunevax.data.safety import load_safety
from tunevax.data.splits import drawn
from tunevax.data.tasks import load_task
from tunevax.errors import UsageError
from tunevax.finetuning.analyze import SinkOptions, analyze_sink, sink_map
from tunevax.finetuning.sft import FinetuneTrainer
from tunevax.finetuning.surgery import SurgeryConfig, SurgeryTrainer, common_queries, divergence
from tunevax.modeling import attention
from tunevax.modeling.attention import sink_columns
from tunevax.modeling.hooks import checkpointed
from tunevax.modeling.loading import load
from tunevax.records import read_run

pytestmark = pytest.mark.numerical

WAYS = ("linear", "eager")
STOCK = type(ALL_ATTENTION_FUNCTIONS).get_interface
SOFTMAX = {"linear": 1e-12, "eager": 2e-7}
"""How far a mean of attention weights may be off: transformers takes its own softmax in fp32, 2^-24 at either end."""
# arXiv 2602.05228's divergence on the model and texts below, rows are layers.
D = [
    [0.043592, -0.265545, -0.474969, -0.244151],
    [-0.214046, -0.102932, 0.316840, -0.004805],
    [-0.353826, 0.336004, 0.044923, -0.197296],
]
TASK = load_task("organism").rows[:24]
SAFETY = load_safety("organism", "alignment", ("chosen", "rejected"))[:16]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """So that even these texts take several chunks."""
    monkeypatch.setattr(attention, "CHUNK_ELEMENTS", {"cpu": 1, "elsewhere": 1})
    monkeypatch.setattr(attention, "MIN_CHUNK_ROWS", 3)


def reference(attn="sdpa"):
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, attn_implementation=attn,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(1234)
    for name, p in sorted(model.named_parameters()):
        size = 0.35 if "q_proj" in name or "k_proj" in name else 0.08
        p.data = torch.randn(p.shape, generator=generator) * size if p.dim() > 1 else torch.ones_like(p)
    return in_float64(model)


def texts():
    """The harmful text of 11 tokens and the refusal of 8, as one padded batch."""
    generator = torch.Generator().manual_seed(7)
    harmful, refusal = (torch.randint(3, 97, (1, n), generator=generator) for n in (11, 8))
    harmful[0, 0] = refusal[0, 0] = 1
    return padded(harmful[0].tolist(), refusal[0].tolist())


def padded(*rows, width=11, fill=5):
    ids = torch.tensor([row + [fill] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": (torch.arange(width) < torch.tensor([[len(r)] for r in rows])).long()}


def sink_values(*args, **kwargs):
    with sink_columns(*args, **kwargs) as values:
        return values


def regulariser(d):
    return torch.relu(d).mean()


def grads(model):
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


def norm(model):
    return torch.cat([g.flatten() for g in grads(model)]).norm().item()


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("how", WAYS)
def test_matches_reference(how, attn):
    model = reference(attn)
    d = divergence(sink_values(model, texts(), how))
    torch.testing.assert_close(d, torch.tensor(D, dtype=d.dtype), rtol=0, atol=1e-6)  # D has six decimals
    assert [tuple(i) for i in (d > 0).nonzero().tolist()] == [(0, 0), (1, 2), (2, 1), (2, 2)]
    r = regulariser(d)
    assert r.item() == pytest.approx(0.0617799, abs=1e-6)
    r.backward()
    assert norm(model) == pytest.approx(2.879987, rel=1e-5)
    last = model.model.layers[-1]  # nothing behind the last attention's softmax gets any
    behind = [last.self_attn.v_proj, last.self_attn.o_proj, last.mlp.up_proj, model.lm_head, model.model.norm]
    assert all(m.weight.grad is None or not m.weight.grad.any() for m in behind)
    assert last.self_attn.q_proj.weight.grad.any() and last.self_attn.k_proj.weight.grad.any()


@pytest.mark.parametrize("how", WAYS)
def test_properties(how):
    model, inputs = reference(), texts()
    d = divergence(sink_values(model, inputs, how))
    wider = {k: torch.nn.functional.pad(v, (0, 5)) for k, v in inputs.items()}
    torch.testing.assert_close(divergence(sink_values(model, wider, how)), d, rtol=0, atol=SOFTMAX[how])
    other = {k: v.flip(0) for k, v in inputs.items()}
    swapped = divergence(sink_values(model, other, how))
    torch.testing.assert_close(swapped, -d, rtol=0, atol=SOFTMAX[how])
    torch.testing.assert_close(regulariser(swapped) + regulariser(d), d.abs().mean())
    same = {k: v[[0, 0]] for k, v in inputs.items()}
    assert divergence(sink_values(model, same, how)).abs().max() <= SOFTMAX[how]
    for p in (model.lm_head.weight, model.model.layers[-1].mlp.down_proj.weight):
        p.data.add_(1)
    assert torch.equal(divergence(sink_values(model, inputs, how)), d)


SMALL = {
    "vocab_size": 80, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "pad_token_id": 0,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2}
GEMMA = {**GROUPED, "head_dim": 8, "query_pre_attn_scalar": 5, "sliding_window": 6}
ARCHITECTURES = {
    "mistral, window": t.MistralConfig(**GROUPED, sliding_window=6),
    "qwen3": t.Qwen3Config(**GROUPED, head_dim=8),
    "gemma2, window and soft cap": t.Gemma2Config(**GEMMA, attn_logit_softcapping=0.7),
    "gemma3, window": t.Gemma3TextConfig(**GEMMA),
    "olmo2": t.Olmo2Config(**GROUPED),
    "phi3": t.Phi3Config(**GROUPED),
    "opt": t.OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32),
    "gpt_neox": t.GPTNeoXConfig(**SMALL, intermediate_size=48),
}


def build(config):
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(config).eval()
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return model


@pytest.mark.parametrize("position", [0, 2])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_linear_is_eager(name, position):
    """Values and gradients; and eager values against attention weights that the model returns itself."""
    model = build(ARCHITECTURES[name])
    generator = torch.Generator().manual_seed(1)
    inputs = padded(*(torch.randint(3, 80, (n,), generator=generator).tolist() for n in (14, 9, 14, 12)), width=14)
    before, found = model.config._attn_implementation, []
    for how in WAYS:
        model.zero_grad()
        values = sink_values(model, inputs, how, position)
        divergence(values).square().sum().backward()
        found.append((values.detach(), grads(model)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-6)
    assert max(g.abs().max() for g in found[1][1]) > 1e-3
    for linear, eager in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(linear, eager, rtol=1e-5, atol=1e-5)
    assert model.config._attn_implementation == before and type(ALL_ATTENTION_FUNCTIONS).get_interface is STOCK
    model.set_attn_implementation("eager")
    for row, length in enumerate((14, 9, 14, 12)):
        weights = model(inputs["input_ids"][row : row + 1, :length], output_attentions=True).attentions
        for layer, a in enumerate(weights):
            column = a[0, :, position + 1 :, position]
            by_hand = column.sum(-1) / (column > 0).all(0).sum()  # what a window hides is exactly 0
            torch.testing.assert_close(found[0][0][row, layer], by_hand, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["mistral, window", "gemma2, window and soft cap", "opt"])
def test_a_choice_of_queries(name):
    """Only those that are named count, by hand from the attention weights, and the gradient is the same both ways."""
    model, generator = build(ARCHITECTURES[name]), torch.Generator().manual_seed(2)
    inputs = padded(*(torch.randint(3, 80, (n,), generator=generator).tolist() for n in (14, 9)), width=14)
    queries = common_queries([(3, 9)], [(2, 6)], 14)
    assert queries.nonzero().tolist() == [[0, i] for i in (3, 4, 5, 6)] + [[1, i] for i in (2, 3, 4, 5)]
    found = []
    for how in WAYS:
        model.zero_grad()
        values = sink_values(model, inputs, how, queries=queries)
        divergence(values).square().sum().backward()
        found.append((values.detach(), grads(model)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-6)
    for linear, eager in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(linear, eager, rtol=1e-5, atol=1e-5)
    model.set_attn_implementation("eager")
    for row, (length, counted) in enumerate(((14, slice(3, 7)), (9, slice(2, 6)))):
        for layer, a in enumerate(
            model(inputs["input_ids"][row : row + 1, :length], output_attentions=True).attentions
        ):
            column = a[0, :, counted, 0]
            by_hand = column.sum(-1) / (column > 0).all(0).sum().clamp_min(1)
            torch.testing.assert_close(found[0][0][row, layer], by_hand, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("longer", ["rejected", "chosen"])
def test_length_alone_is_no_divergence(longer):
    """An answer against itself, cut after three words and ended: nothing differs where both have tokens."""
    loaded = load("organism")
    rows = [{**row, "chosen": row["rejected"]} for row in SAFETY]
    shorter = "chosen" if longer == "rejected" else "rejected"
    rows = [{**row, shorter: " ".join(row["rejected"].split()[:3])} for row in rows]
    common, published = (
        sink_map(loaded.model, loaded.tokenizer, rows, 16, queries=queries) for queries in ("common", "all")
    )
    # Attention weights are at most 1, in fp32: rounding is some 2^-24 for each.
    assert common.abs().max() < 1e-6 < 1e-2 < published.abs().mean()
    assert ((published > 0) == (longer == "chosen")).float().mean() > 0.9  # the shorter text pays the sink more


def test_where_an_answer_ends():
    """Whatever the template puts behind the answer is no part of it."""
    loaded, row = load("organism"), {**SAFETY[0], "completion": SAFETY[0]["rejected"]}
    words = loaded.tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
    for end in ("", "{{ eos_token }}", " {{ pad_token }}\n{{ eos_token }}"):
        loaded.tokenizer.chat_template = (
            "{{ bos_token }}{% for m in messages %}{{ m.content }} {% if m.role == 'assistant' %}" + end + "{% endif %}"
            "{% endfor %}"
        )
        (encoded,) = encode([row], loaded.tokenizer, 64)
        start, stop = answer_span(encoded, loaded.tokenizer)
        assert encoded["input_ids"][start:stop] == words and stop < len(encoded["input_ids"])


def test_a_window_without_a_mask():
    """As flash attention is called: no mask, only the width of the window."""
    generator, window = torch.Generator().manual_seed(0), 5
    q, k = (torch.randn(2, h, 12, 4, generator=generator).requires_grad_() for h in (4, 2))
    i, j = torch.arange(12)[:, None], torch.arange(12)
    mask = ((j <= i) & (j > i - window)).expand(2, 1, 12, 12)
    weight, upstream = torch.rand(2, 12, generator=generator), torch.randn(2, 4, generator=generator)
    for position in (0, 3):
        counted = weight * ((j > position) & (j < position + window))
        ours = attention._SinkMean.apply(q, k, counted, None, position, 0.5, None, window)
        scores = q @ k.repeat_interleave(2, 1).transpose(2, 3) * 0.5
        dense = scores.masked_fill(~mask, float("-inf")).softmax(-1)[..., position]
        expected = (dense * counted[:, None]).sum(-1)
        torch.testing.assert_close(ours, expected)
        for a, b in zip(*(torch.autograd.grad(x, (q, k), upstream) for x in (ours, expected)), strict=True):
            torch.testing.assert_close(a, b)


def test_silent_failures_are_errors(monkeypatch):
    model = reference()
    with monkeypatch.context() as patch, pytest.raises(UsageError, match="'sdpa' and could not be switched to eager"):
        patch.setattr(model, "set_attn_implementation", lambda *_: None)
        sink_values(model, texts(), "eager")
    model.train().activation_checkpointing_enable({"use_reentrant": True})
    for how in WAYS:
        with pytest.raises(UsageError, match="without a gradient, as it does under reentrant gradient checkpointing"):
            sink_values(model, texts(), how)
    assert model.config._attn_implementation == "sdpa" and type(ALL_ATTENTION_FUNCTIONS).get_interface is STOCK
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert all(sink_values(model, texts(), how).requires_grad for how in WAYS)
    config = {**GROUPED, "vocab_size": 97, "num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8}
    learned = build(t.GptOssConfig(**config, attn_implementation="eager"))
    with pytest.raises(UsageError, match="GptOssForCausalLM has learned sinks"):
        sink_values(learned, texts())
    with pytest.raises(UsageError, match="GptOssForCausalLM do not add up to 1"):
        sink_values(learned, texts(), "eager")
    falcon = build(t.FalconConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4))
    with pytest.raises(UsageError, match="FalconForCausalLM has an attention that does not go through"):
        sink_values(falcon, texts())
    with pytest.raises(UsageError, match="a text of 8 tokens has none after the sink token at position 7"):
        sink_values(reference(), texts(), sink=7)
    with pytest.raises(UsageError, match="padded on the left"):
        sink_values(reference(), {k: v.flip(1) for k, v in texts().items()})


@pytest.mark.parametrize("how", WAYS)
def test_recomputed_blocks_give_the_same_gradient(how):
    model = reference()
    regulariser(divergence(sink_values(model, texts(), how))).backward()
    kept = grads(model)
    model.zero_grad()
    with checkpointed(list(model.model.layers)), sink_columns(model, texts(), how) as values:
        regulariser(divergence(values)).backward()
    assert all(torch.equal(a, b) for a, b in zip(kept, grads(model), strict=True))


@pytest.mark.slow
def test_memory_is_linear():
    """No tensor of tokens x tokens is made, let alone kept, in the forward or the backward pass."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            sizes = [x.untyped_storage().nbytes() // 4 for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
            self.elements = max([self.elements, *sizes])
            return result

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=512, attn_implementation="sdpa",
    )  # fmt: skip
    model, ids = LlamaForCausalLM(config), torch.randint(0, 32, (2, 512), generator=torch.Generator().manual_seed(0))
    largest = {}
    for how in WAYS:
        with Largest() as largest[how]:
            values = sink_values(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, how)
            divergence(values).square().sum().backward()
    assert largest["eager"].elements >= 2 * 2 * 512 * 512
    assert largest["linear"].elements <= 2 * 512 * 32  # rows x tokens x the wider of vocabulary and hidden


# --- training --------------------------------------------------------------------------------------------------------

TRAINING = {
    "max_steps": 5, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 2e-3,
    "warmup_steps": 0, "max_length": 64, "save_strategy": "no", "logging_steps": 1, "seed": 3,
}  # fmt: skip


@pytest.fixture
def make(tmp_path):
    def build(cls=SurgeryTrainer, safety=SAFETY, **options):
        loaded = load("organism")
        config = cls.config_class(str(tmp_path), **{**TRAINING, **options})
        return cls(loaded.model, config, safety_data=safety, task_data=TASK, processing_class=loaded.tokenizer)

    return build


def weights(trainer):
    return [p.detach().clone() for p in trainer.parameters]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"sink_attention": "eager"}, {"pairing": "random"}, {"every": 2}, {"sink_queries": "all"}],
)
def test_gradient_of_a_step_is_that_of_the_loss(make, options):
    """f + lamb R put together by hand in one graph, over the micro-batches of steps 0 and 1, each of two."""
    from tunevax.data.encoding import collate

    trainer, plain = make(lamb=40.0, pairs_per_step=3, **options), make(FinetuneTrainer)
    again = make(lamb=40.0, pairs_per_step=3, **options)
    generator = torch.Generator().manual_seed(0)
    for p, q, r in zip(trainer.parameters, plain.parameters, again.parameters, strict=True):
        p.data += torch.randn(p.shape, generator=generator) * 0.05
        q.data, r.data = p.data.clone(), p.data.clone()
    batch = collate(trainer.train_dataset[:2], trainer.processing_class.pad_token_id)
    extra = [0.0] * len(plain.parameters)
    for number in (0, 1):  # gradients add up to what is there
        for one in (trainer, plain):
            one.current_gradient_accumulation_steps = 2
            one.state.global_step = number
            for _ in range(2):
                one.training_step(one.model, batch, torch.tensor(40))
        rows = again.draw() if number % trainer.args.every == 0 else None
        if rows:
            harmful, refusals = rows
            assert (harmful == refusals) == (options.get("pairing") != "random")
            assert len(set(harmful)) == 3
            texts = [again.encode_answers([SAFETY[i]], "rejected")[0] for i in harmful]
            texts += [again.encode_answers([SAFETY[i]], "chosen")[0] for i in refusals]
            inputs = collate(texts, again.processing_class.pad_token_id)
            queries = None
            if options.get("sink_queries") != "all":  # the answers end in one token more, and prompts come before
                ends = [len(text["input_ids"]) - 1 for text in texts]
                starts = [text["labels"].count(-100) for text in texts]
                queries = torch.zeros(inputs["input_ids"].shape, dtype=torch.bool)
                for i, j in zip((0, 1, 2), (3, 4, 5), strict=True):
                    common = min(ends[i] - starts[i], ends[j] - starts[j])
                    for k in (i, j):
                        queries[k, starts[k] : starts[k] + common] = True
            r = 40 * regulariser(divergence(sink_values(plain.model, inputs, "eager", 0, queries)))
            found = torch.autograd.grad(r, plain.parameters, allow_unused=True)
            extra = [e if g is None else e + g for e, g in zip(extra, found, strict=True)]
            assert r.item() / 40 == pytest.approx(trainer._metrics["sink_loss"][-1], rel=1e-4)
        for p, q, e in zip(trainer.parameters, plain.parameters, extra, strict=True):
            torch.testing.assert_close(p.grad, q.grad + e, rtol=1e-3, atol=1e-5)
    assert len(trainer._metrics["sink_loss"]) == (1 if options.get("every") == 2 else 2)


@pytest.mark.slow
def test_it_lowers_what_it_is_for(make):
    """R on the pairs, after as many steps with and without."""
    found = []
    for cls in (FinetuneTrainer, SurgeryTrainer):
        trainer = make(cls, max_steps=15, **({"pairs_per_step": 8} if cls is SurgeryTrainer else {}))
        trainer.train()
        d = sink_map(trainer.model, trainer.processing_class, SAFETY)
        found.append(regulariser(d).item())
    assert found[1] < 0.7 * found[0]


@pytest.mark.slow
def test_bad_input(make):
    for options, told in (
        ({"lamb": -1.0}, "lamb is -1.0"), ({"lamb": float("inf")}, "lamb is inf"), ({"lamb": float("nan")}, "lamb is"),
        ({"pairs_per_step": 0}, "pairs_per_step is 0"), ({"every": 0}, "every is 0"), ({"sink_position": -1}, "sink_position"),
        ({"pairing": "randon"}, "did you mean 'random'"), ({"sink_queries": "comon"}, "did you mean 'common'"),
        ({"sink_attention": "eagre"}, "did you mean 'eager'"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=told):
            SurgeryConfig(output_dir="x", **options)
    with pytest.raises(UsageError, match="`rejected` is missing"):
        make(safety=[{"prompt": "p", "chosen": "c", "rejected": None}])
    with pytest.raises(UsageError, match="needs safety rows"):
        make(safety=None)
    with pytest.raises(UsageError, match="there are 16 pairs and a step takes 17"):
        make(pairs_per_step=17)
    with pytest.raises(UsageError, match="all pairs have the same one"):
        make(safety=[SAFETY[0]] * 3, pairing="random")
    with pytest.raises(UsageError, match="two answers of pair 1 are the same within 64 tokens"):
        make(safety=[{**SAFETY[0], "rejected": SAFETY[0]["chosen"]}] * 2)
    shortest = min(len(row["input_ids"]) for a in ("chosen", "rejected") for row in make().encode_answers(SAFETY, a))
    with pytest.raises(UsageError, match=f"text of {shortest} tokens and sink_position is {shortest - 1}"):
        make(sink_position=shortest - 1)
    begins = {**SAFETY[0], "rejected": " ".join(SAFETY[0]["chosen"].split()[:2])}
    with pytest.raises(UsageError, match="two answers of pair 1 are the same over the 2 tokens that both have"):
        make(safety=[begins, SAFETY[1]])
    make(safety=[begins, SAFETY[1]], sink_queries="all")
    for targets in ("v_proj,o_proj", "up_proj", "layers.2.self_attn.v_proj"):
        with pytest.raises(UsageError, match="train no query or key projection"):
            make(lora_targets=targets)
    make(lora_targets="v_proj,k_proj")
    loaded = load("organism")
    loaded.model.config.max_position_embeddings = 4
    with pytest.raises(UsageError, match="the model's context 4"):
        SurgeryTrainer(
            loaded.model, SurgeryConfig("x", **TRAINING), safety_data=SAFETY, task_data=TASK,
            processing_class=loaded.tokenizer,
        )  # fmt: skip


@pytest.mark.slow
def test_analysis_of_two_models(tmp_path):
    options = SinkOptions(
        model=["organism"] * 2, safety_data="organism", output_dir=str(tmp_path / "a"), pairs=10, batch_size=4
    )
    run = analyze_sink(options)
    written = json.loads((run / "sink.json").read_text())
    first, second = written["models"]
    assert written["sink_queries"] == "common"
    assert first["d"] == second["d"] and [first["label"], second["label"]] == ["organism", "organism'"]
    loaded, pairs = load("organism"), load_safety("organism", "evaluation", ("chosen", "rejected"))
    pairs = drawn(pairs, 10)
    one_by_one = torch.stack([sink_map(loaded.model, loaded.tokenizer, [p], how="eager") for p in pairs]).mean(0)
    d = torch.tensor(first["d"])
    torch.testing.assert_close(d, one_by_one, rtol=1e-4, atol=1e-6)
    assert first["positive_heads"] == int((d > 0).sum()) and first["heads"] == d.numel() == 32
    assert first["R"] == pytest.approx(regulariser(d).item(), rel=1e-4) and read_run(run)["verb"] == "analyze"
    with pytest.raises(UsageError, match="one model or two"):
        analyze_sink(SinkOptions(model=["organism"] * 3, safety_data="organism", output_dir=str(tmp_path / "b")))
