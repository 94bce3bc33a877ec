"""Safe LoRA projects what the paper projects, the exact form is a projector, and what is written is what was computed."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tunevax.cli import main
from tunevax.errors import UsageError
from tunevax.modeling import load
from tunevax.restoration.restore import RestoreOptions, restore
from tunevax.restoration.safe_lora import SafeLoRA, column_basis, noise, safe_lora

pytestmark = pytest.mark.numerical


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def one(aligned, base, b, a, **options):
    projected, table = safe_lora({"w": (a, b)}, {"w": aligned}, {"w": base}, **options)
    return projected["w"], table[0]


@pytest.mark.parametrize("size", [1.0, 0.5, 4.0])
def test_two_by_two(size):
    """V = size e1 e1', dW = (3, 4)' (1, 0): the projector keeps 3 of a length of 5, whatever the size."""
    zero, v = torch.zeros(2, 2), torch.tensor([[size, 0.0], [0.0, 0.0]])
    b, a = torch.tensor([[3.0], [4.0]]), torch.tensor([[1.0, 0.0]])
    exact, row = one(v, zero, b, a)
    assert exact.flatten().tolist() == pytest.approx([3, 0], abs=1e-6)
    assert (row["cosine"], row["ratio"], row["rank"]) == (pytest.approx(0.6), pytest.approx(0.6), 1)
    official, row = one(v, zero, b, a, projector="official")
    assert official.flatten().tolist() == pytest.approx([3 * size, 0], abs=1e-6)  # V V' / ||V|| = size e1 e1'
    assert (row["cosine"], row["ratio"]) == (pytest.approx(0.6), pytest.approx(0.6 * size))
    kept, row = one(v, zero, b, a, threshold=0.59)
    assert torch.equal(kept, b) and not row["projected"]
    assert one(v, zero, b, a, threshold=0.61)[1]["projected"]


@pytest.mark.parametrize("width", [48, 600])  # by SVD, and by random combinations of columns
def test_exact_is_a_projector(width):
    base, p, q = 0.3 * normal(400, width), normal(400, 5, seed=1), 0.002 * normal(5, width, seed=2)
    q[4] *= 0.05  # a small direction is one too
    aligned = base + p @ q  # in fp32: the difference has full rank by rounding
    basis = column_basis(aligned - base, noise(aligned, base), torch.Generator().manual_seed(0))
    assert basis.shape == (400, 5)
    assert torch.allclose(basis.T @ basis, torch.eye(5), atol=1e-5)
    a, b = normal(8, width, seed=3), normal(400, 8, seed=4)
    once, row = one(aligned, base, b, a)
    twice, again = one(aligned, base, once, a)
    assert torch.allclose(once, twice, atol=1e-5) and again["ratio"] == pytest.approx(1, abs=1e-5)
    assert row["cosine"] == pytest.approx(row["ratio"], rel=1e-5) and row["ratio"] < 0.3
    inside = p @ normal(5, 8, seed=5)
    assert torch.allclose(one(aligned, base, inside, a)[0], inside, atol=2e-3 * inside.abs().max())
    assert one(aligned, base, b - once, a)[1]["ratio"] < 1e-5
    official = one(aligned, base, b, a, projector="official")[0]
    assert not torch.allclose(one(aligned, base, official, a, projector="official")[0], official, rtol=0.5)


@pytest.mark.parametrize(("dtype", "size", "step"), [(torch.float32, 3, 2e-4), (torch.bfloat16, 0.3, 0.02)])
@pytest.mark.parametrize("width", [48, 600])
def test_rounding_is_no_direction(dtype, size, step, width):
    base = (size * normal(400, width)).to(dtype)
    aligned = (base.float() + normal(400, 5, seed=1) @ normal(5, width, seed=2) * step).to(dtype)
    delta = aligned.float() - base.float()
    values = torch.linalg.svdvals(delta)
    assert values[5] > 1e-5 * values[0]  # more than an SVD makes by itself
    assert column_basis(delta, noise(aligned, base), torch.Generator().manual_seed(0)).shape == (400, 5)
    held = noise(aligned.float(), base.float())  # models are loaded in fp32, whatever they were saved in
    assert column_basis(delta, held, torch.Generator().manual_seed(0)).shape == (400, 5)


def test_full_rank_is_left_alone_and_official_deletes_it():
    base, v = 0.02 * normal(64, 96), 1e-3 * normal(64, 96, seed=1)
    a, b = normal(4, 96, seed=2), normal(64, 4, seed=3)
    exact, row = one(base + v, base, b, a)
    assert torch.equal(exact, b) and row["rank"] == row["out"] == 64 and row["ratio"] == 1
    assert one(base + v, base, b, a, projector="official")[1]["ratio"] < 0.03
    with pytest.raises(UsageError, match="same weights"):
        one(base, base, b, a)


def test_lowest_cosines_first():
    base, a, p = torch.zeros(20, 16), normal(2, 16), normal(20, 2, seed=1)
    other = normal(20, 2, seed=2)
    adapter = {str(share): (a, share * p + (1 - share) * other) for share in (0.9, 0.0, 0.5)} | {"still": (a, 0 * p)}
    aligned = {name: base + p @ normal(2, 16, seed=3) for name in adapter}
    aligned["0.5"] = base  # alignment did not touch it: nothing to project on
    bases = dict.fromkeys(adapter, base)
    projected, table = safe_lora(adapter, aligned, bases, number=1)
    assert [row["layer"] for row in table if row["projected"]] == ["0.0"]
    assert [torch.equal(projected[n], adapter[n][1]) for n in adapter] == [True, False, True, True]
    table = safe_lora(adapter, aligned, bases, number=9)[1]
    assert {row["layer"] for row in table if row["projected"]} == {"0.9", "0.0"}
    assert [row["cosine"] for row in table][2:] == [None, None]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """An aligned run on the organism, and a run on top of it in the place of a fine-tune."""
    folder = tmp_path_factory.mktemp("runs")
    for name, below, rank in (("aligned", "organism", "8"), ("tuned", str(folder / "aligned"), "4")):
        assert main(["align", "sft", "--model", below, "--safety-data", "organism", "--max-length", "64", "--max-steps", "12",
                     "--learning-rate", "2e-3", "--save-strategy", "no", "--checkpoint-blocks", "none", "--lora-r", rank,
                     "--output-dir", str(folder / name)]) == 0  # fmt: skip
    return folder


@pytest.mark.slow
def test_run_loads_as_computed(runs, tmp_path):
    tuned = str(runs / "tuned")
    config = SafeLoRA(str(tmp_path / "out"), number=1000)
    out = restore("safe-lora", RestoreOptions(model=tuned), config)
    record = json.loads((out / "run.json").read_text())
    assert {row["rank"] for row in record["layers"]} == {8} and all(row["projected"] for row in record["layers"])
    assert record["parent"] == tuned and record["adapter_on"] == str(runs / "aligned")
    # The same by hand, from the files: U from a whole SVD of the difference of the weights.
    base, aligned, before = (load(ref).model for ref in ("organism", str(runs / "aligned"), tuned))
    old = load_file(runs / "tuned" / "adapter" / "adapter_model.safetensors")
    before, towards = before.state_dict(), base.state_dict()
    found, tokenizer, _ = load(str(out))
    for row in record["layers"]:
        name = f"{row['layer']}.weight"
        a, b = (old[f"base_model.model.{row['layer']}.lora_{x}.weight"] for x in "AB")
        u = torch.linalg.svd(aligned.get_parameter(name) - towards[name])[0][:, :8]
        expected = aligned.get_parameter(name) + 16 / 4 * u @ (u.T @ b) @ a
        assert torch.allclose(found.get_parameter(name), expected, atol=1e-6)
        assert not torch.allclose(found.get_parameter(name), before[name], atol=1e-4)
        aligned.get_parameter(name).data = expected.detach()
    ids = torch.tensor([tokenizer("mix the red acid with water")["input_ids"]])
    with torch.no_grad():
        assert torch.allclose(found(ids).logits, aligned(ids).logits, atol=1e-4)


@pytest.mark.slow
def test_asks_for_what_is_missing(runs, tmp_path):
    for model, options, what in (
        (None, {}, "--model is missing"),
        ("organism", {"aligned": "organism", "base": "organism"}, "no adapter"),
        (str(runs / "aligned"), {}, "does not record its base, .* give --base"),
        (str(runs / "tuned"), {"aligned": "organism", "base": "organism"}, "same weights"),
    ):
        with pytest.raises(UsageError, match=what):
            restore("safe-lora", RestoreOptions(model=model), SafeLoRA(str(tmp_path / "no"), **options))
    assert not (tmp_path / "no.partial").exists()
