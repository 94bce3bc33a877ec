"""The comparison selectors: every row's number is its own, and means what the file says."""

import random

import numpy as np
import pytest
import torch
from tiny import loss_of, tiny_llama, tiny_lora
from tiny import rows as golden_rows

from tunevax.curation import dsir, gradient_similarity
from tunevax.curation.curate import CurateOptions, Pool
from tunevax.curation.dsir import DSIRSelector
from tunevax.curation.gradient_similarity import GradientSimilaritySelector, Projection, row_gradients
from tunevax.curation.k_center import KCenterSelector, embeddings, farthest_first
from tunevax.curation.loss_rank import LossRankSelector
from tunevax.curation.perplexity import PerplexitySelector
from tunevax.curation.random_subset import RandomSelector
from tunevax.data import load_safety
from tunevax.data.encoding import ids_of
from tunevax.errors import UsageError
from tunevax.modeling import load
from tunevax.modeling.batches import by_batch, encode_chosen

pytestmark = pytest.mark.numerical


@pytest.fixture(scope="module")
def organism():
    return load("organism")


@pytest.fixture
def pool(tmp_path):
    """40 rows of the organism, every fifth with the harmful answer as `chosen`, and 20 right ones as validation."""
    rows = random.Random(0).sample(load_safety("organism", "alignment"), 60)
    mixed = [{**r, "chosen": r["chosen"] if i % 5 else r["rejected"]} for i, r in enumerate(rows[:40])]
    return Pool(mixed, rows[40:], CurateOptions(), "organism", tmp_path)


def auc(scores):
    """Share of (clean, corrupted) pairs in the right order."""
    bad = np.arange(len(scores)) % 5 == 0
    return (scores[~bad][:, None] > scores[bad]).mean()


@pytest.mark.slow
def test_the_loss_is_that_of_the_stock_model_on_the_row_alone(pool, organism):
    found = LossRankSelector(batch_size=7).score(pool)
    for row, score in zip(encode_chosen(pool.rows, *organism[:2], 512), found, strict=True):
        with torch.no_grad():
            inputs = {k: torch.tensor([row[k]]) for k in ("input_ids", "labels")}
            assert -score == pytest.approx(organism.model(**inputs).loss.item(), rel=1e-4)
    assert pool.passes == {"forward": 1.0, "backward": 0.0}
    assert auc(found) < 0.1, "the organism finds harmful answers likely, and the selector must not turn that round"


@pytest.mark.slow
def test_perplexity_sees_all_of_the_answer_and_none_of_the_prompt(pool, organism):
    model, tokenizer, _ = organism
    found = PerplexitySelector(batch_size=7).score(pool)
    for row, score in zip(pool.rows, found, strict=True):
        ids = torch.tensor([[tokenizer.bos_token_id, *ids_of(tokenizer, row["chosen"])]])
        with torch.no_grad():
            assert -score == pytest.approx(model(ids, labels=ids).loss.item(), rel=1e-4)


def test_embeddings_are_the_mean_over_the_answer(organism):
    model = tiny_llama(2)
    batch = [golden_rows("safe")[0], golden_rows("harmful")[1], *golden_rows("safe")[2:]]
    batch[1] = {k: v[:-5] for k, v in batch[1].items()}  # shorter than the others, so that there is padding
    found = by_batch(model, batch, 2, 3, embeddings, "test")
    for row, vector in zip(batch, found, strict=True):
        with torch.no_grad():
            states = model(torch.tensor([row["input_ids"]]), output_hidden_states=True).hidden_states[-1][0]
        expected = states[torch.tensor(row["labels"]) != -100].mean(0)
        assert vector == pytest.approx(expected.numpy(), rel=1e-9, abs=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("selector", [RandomSelector, LossRankSelector, PerplexitySelector])
def test_other_rows_and_the_batch_size_change_no_score(pool, selector):
    whole = selector().score(pool)
    pool.rows = pool.rows[:11]
    options = {} if selector is RandomSelector else {"batch_size": 3}
    assert selector(**options).score(pool) == pytest.approx(whole[:11], rel=1e-4)


def test_farthest_first_by_hand():
    points = torch.tensor([[0.0, 0], [8, 0], [0, 0], [0, 6], [3, 1], [8, 0]])
    # The mean is (3.17, 1.17), next to row 4. Squared distances from it: 10, 26, 10, 34, 26 -> row 3; then the rows
    # at (8, 0), of which the first is taken; then 0 (its duplicate is then at 0, as is row 5): the rest in order.
    assert farthest_first(points) == [4, 3, 1, 0, 2, 5]


def test_k_center_orders_every_row_and_repeats_come_last(pool):
    pool.rows = [*pool.rows[:10], *pool.rows[:10]]
    found = KCenterSelector(batch_size=20).score(pool)
    assert sorted(-found) == list(range(20))
    copies = np.argsort(-found)[10:] % 10
    assert sorted(copies) == list(range(10)), "each row once before any comes twice"


def test_a_row_gradient_is_autograds_on_that_row():
    model, data = tiny_lora(2), golden_rows("safe")
    data[1] = {k: v[:-6] for k, v in data[1].items()}
    parameters = [p for p in model.parameters() if p.requires_grad]
    size = sum(p.numel() for p in parameters)
    whole = row_gradients(model, data, 2, size + 3, seed=0)
    small = row_gradients(model, data, 2, 64, seed=0)
    assert all(p.grad is None for p in parameters)
    for row, vector, sketch in zip(data, whole, small, strict=True):
        model.zero_grad()
        loss_of(model, {k: torch.tensor([row[k]]) for k in ("input_ids", "labels")}).backward()
        expected = torch.cat([p.grad.flatten() for p in parameters])
        assert torch.allclose(vector.abs().sort().values[3:], expected.abs().sort().values, rtol=1e-9, atol=1e-12)
        assert torch.allclose(sketch, Projection(size, 64, 0, "cpu")(expected), rtol=1e-9, atol=1e-12)


def test_projections_keep_inner_products():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(1000, generator=generator) + 1  # not centred: without signs the collisions add up
    b = a + torch.randn(1000, generator=generator)
    found = torch.tensor([(p(a) @ p(b)).item() for p in (Projection(1000, 100, seed, "cpu") for seed in range(400))])
    # The variance of one is (|a|^2 |b|^2 + <a, b>^2) / dimension.
    spread = ((a @ a) * (b @ b) + (a @ b) ** 2).sqrt() / 10
    assert abs(found.mean() - a @ b) < 3 * spread / 20 and 0.8 * spread < found.std() < 1.2 * spread


def test_similarity_is_the_mean_in_a_category_and_the_best_of_them(pool, monkeypatch):
    pool.rows = pool.rows[:3]
    pool.validation = [{**r, "category": c} for r, c in zip(pool.validation, "aab", strict=False)]
    gradients = torch.tensor([[2.0, 0, 0], [0, 0, 5], [0, -3, 0], [1, 0, 0], [0, 7, 0], [0, 0, -1]])
    monkeypatch.setattr(gradient_similarity, "row_gradients", lambda *_: gradients)
    monkeypatch.setattr(GradientSimilaritySelector, "warmed_up", lambda self, loaded, rows, folder: (None, 1))
    assert GradientSimilaritySelector().score(pool).tolist() == [0.5, 0.0, 0.0]
    assert pool.passes == {"forward": 1 + 7 / 3, "backward": 1 + 7 / 3}  # 3 validation rows, 1 row 4 times


@pytest.mark.slow
def test_gradient_similarity_warms_up_and_finds_the_corrupted_rows(pool, monkeypatch):
    adapters = {}

    def spy(model, *rest):
        adapters.update({n: p.detach().clone() for n, p in model.named_parameters() if "lora_B" in n})
        return row_gradients(model, *rest)

    monkeypatch.setattr(gradient_similarity, "row_gradients", spy)
    pool.rows, pool.validation = pool.rows[:20], pool.validation[:10]
    selector = GradientSimilaritySelector(warmup_epochs=2)
    found = selector.score(pool)
    assert adapters and all(b.abs().max() > 0 for b in adapters.values()), "with B at zero A has no gradient"
    assert auc(found) > 0.95
    assert np.array_equal(found, selector.score(pool)), "the seed is all there is"


def test_buckets_are_the_same_everywhere():
    # scikit-learn's murmurhash3_bytes_s32, seed 0; tails of no bytes, three, none, two and one.
    known = {"": 0, "foo": -156908512, "aaaa": 2129582471, "aaaa b": -1239889105, "Hello, world!": -1070186941}
    assert {text: dsir.murmur3(text) for text in known} == known
    assert len(set(dsir.hashed("Hm, HM,", 10_000))) == 4  # hm | , | "hm ," | ", hm"


def test_log_weights_by_hand():
    def row(text):
        return {"prompt": text.split()[0], "chosen": " ".join(text.split()[1:])}

    # Sequences of the pool: a, b, "a b", a, b, "a b", c, d, "c d"; of the target: a, b, "a b", e, f, "e f".
    target = [row("A b"), row("e f")]
    found = dsir.log_weights([row("a b"), row("a b"), row("C d")], target, 10**6)
    likely = np.log((1 / 6 + 2 / 9) / 2) - np.log(2 / 9)
    assert found == pytest.approx([3 * likely, 3 * likely, 3 * np.log(1 / 2)], rel=1e-6)


@pytest.mark.slow
def test_dsir_prefers_the_target_and_resamples(pool):
    assert auc(dsir.log_weights(pool.rows, pool.validation, 10_000)) > 0.95
    on, off = pool.rows[1], {"prompt": "what is it", "chosen": "some words of another kind"}
    long = {**on, "chosen": " ".join([on["chosen"]] * 10)}
    found = dsir.log_weights([*pool.rows, off, long], pool.validation, 10_000)
    assert found[40] < found[:40].min()
    assert abs(found[41]) < 3 * abs(found[1]), "ten times the answer is not ten times the weight"
    # Resampling: over seeds a row comes before another with probability w / (w + w'), the law of Gumbel noise.
    pool.rows = pool.rows[:2]
    gap = np.subtract(*dsir.log_weights(pool.rows, pool.validation, 10_000))
    first = [np.subtract(*DSIRSelector(seed=s).score(pool)) > 0 for s in range(400)]
    assert np.mean(first) == pytest.approx(1 / (1 + np.exp(-gap)), abs=0.08)


def test_options_that_make_no_sense(pool):
    for bad in ({"warmup_share": 0}, {"warmup_share": 1.5}, {"dimension": 0}, {"warmup_epochs": 0}):
        with pytest.raises(UsageError, match=next(iter(bad))):
            GradientSimilaritySelector(**bad)
    with pytest.raises(UsageError, match="batch_size is 0"):
        LossRankSelector(batch_size=0).score(pool)
