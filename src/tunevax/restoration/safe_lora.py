"""Safe LoRA (arXiv 2405.16833): project a fine-tune's adapter onto what alignment changed, without training.

For each linear layer with an adapter dW = s B A,

    V = W_aligned - W_base,      C = P(V),      cos = <C dW, dW> / (||C dW|| ||dW||)                  (Frobenius)
    B <- C B     in the `number` layers of the lowest cosine, or in all with cosine <= `threshold`

    exact      C = U U^T, U an orthonormal basis of the columns of V. Alignment by LoRA of rank r gives a V of rank r,
               and C is a projector. With a V of full rank (alignment of all weights) C is the identity, and Safe LoRA
               changes nothing; a note reports it.
    official   C = V V^T / ||V||, as published. Not a projector: it is not idempotent, and scales with V, so that with
               an alignment by small steps the projected layers vanish (||C dW|| / ||dW|| = 1.4e-3 for a dense V with
               entries of 1e-3). The cosine does not depend on that scale.

C, [out, out], is never formed: U (U^T B), V (V^T B). s drops out. Neither C has a sign: a fine-tune that undoes the
alignment, dW = -V, passes unchanged (exact) and has the cosine of V itself.

Cost: no forward pass. Per layer, V V^T B takes 4 out in r operations, and the basis of a V of rank k about 8 out in k;
a V of high rank takes a full SVD. Memory: the aligned and the base model on the CPU, in fp32, which keeps
W_aligned - W_base from rounding, and V of one layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from tunevax.console import bar, console
from tunevax.errors import UsageError, require, require_one_of
from tunevax.lineage import Lineage, absolute
from tunevax.mixins import option
from tunevax.modeling.adapters import factors, lora_layers, weights
from tunevax.modeling.precision import wide
from tunevax.restoration.restore import Job


@dataclass
class SafeLoRA:
    """Options of `tunevax restore safe-lora`; `--model` is a run or an adapter folder. Default as published: the 10
    layers of the lowest cosine. Writes an adapter for the same model as the fine-tune's own."""

    output_dir: str | None = option(None, "the run folder to write")
    seed: int = option(42, "of the search for the directions of V")
    aligned: str | None = option(None, "the aligned model; default the one that --model was fine-tuned from")
    base: str | None = option(None, "the model before alignment; default the one that the aligned one was made from")
    projector: str = option("exact", "exact, or official (not a projector; as published)")
    number: int = option(10, "layers to project, those of the lowest cosine")
    threshold: float | None = option(None, "project every layer of at most this cosine instead")
    models_held: ClassVar[int] = 3
    paper: ClassVar[str] = "arXiv 2405.16833"

    def __post_init__(self) -> None:
        require_one_of(self, projector=("exact", "official"))
        require(self, "number", at_least=1)
        require(self, "threshold", at_least=-1, at_most=1, meaning="a cosine")

    def run(self, job: Job) -> None:
        """Project and write the adapter; the record gets a row per layer under `layers`."""
        ref = job.ref
        aligned_ref = self.aligned or Lineage.of(ref).adapter_on
        base_ref = self.base or (aligned_ref and Lineage.of(aligned_ref).adapter_on)
        if not aligned_ref or not base_ref:
            missing = (
                "base, the model before its alignment," if aligned_ref else "aligned, the model before the fine-tune,"
            )
            raise UsageError(
                f"{ref} does not record its {missing} as a fine-tuned run does; give --{missing.split(',')[0]}"
            )
        loaded = job.load(dtype="float32", device="cpu", merge=False)
        layers = lora_layers(loaded.model, ref)
        adapter = {name: factors(layer) for name, layer in layers.items()}
        model = job.load(aligned_ref, dtype="float32", device="cpu").model if self.aligned else loaded.model
        aligned = weights(model, layers, aligned_ref)
        base = weights(job.load(base_ref, dtype="float32", device="cpu").model, layers, base_ref)
        draws = torch.Generator().manual_seed(self.seed)
        projected, table = safe_lora(adapter, aligned, base, self.projector, self.number, self.threshold, draws)
        full = [row["layer"] for row in table if row["rank"] == row["out"]]
        if full and self.projector == "exact":
            console.print(
                f"{len(full)} of {len(table)} layers, {full[0]} the first: alignment changed them in every direction, "
                "and the exact projector is the identity there; --projector official is not"
            )
        with torch.no_grad():
            for name, weight in projected.items():
                factors(layers[name])[1].copy_(weight)
        job.save_adapter(loaded.model, loaded.tokenizer, Lineage.of(ref).adapter_on or aligned_ref)
        job.record.update({"aligned": absolute(aligned_ref), "base": absolute(base_ref), "layers": table})


@torch.no_grad()
def safe_lora(
    adapter: Mapping[str, tuple[torch.Tensor, torch.Tensor]], aligned: Mapping[str, torch.Tensor],
    base: Mapping[str, torch.Tensor], projector: str = "exact", number: int = 10, threshold: float | None = None,
    generator: torch.Generator | None = None,
) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:  # fmt: skip
    """Project the adapters of a fine-tune; nothing is changed in place.

    Args:
        adapter: layer name to (A [r, in], B [out, r]).
        aligned, base: layer name to weight [out, in]; differences within rounding to their dtype do not count.
        projector: `exact` or `official`.
        number: layers to project, the lowest cosines first.
        threshold: if given, project every layer whose cosine is at most this instead.
        generator: of the search for the directions of V; default seeded with 0.

    Returns:
        B for each layer, as given where it was not projected; and a row per layer: `layer`, `out` (rows of W), `rank`
        (of V), `cosine`, `ratio` = ||C dW|| / ||dW||, `projected`. The last three are None, None and False where V or
        dW is 0.

    Raises:
        UsageError: the two models are the same, or of other shapes.
    """
    generator = generator or torch.Generator().manual_seed(0)
    images: dict[str, torch.Tensor] = {}
    table = []
    with bar() as progress:
        task = progress.add_task("safe-lora", total=len(adapter), note="")
        for name, (a, b) in adapter.items():
            if not aligned[name].shape == base[name].shape == (len(b), a.shape[1]):
                raise UsageError(f"{name}: the adapter, the aligned and the base model have other shapes")
            a, b, delta = wide(a), wide(b), wide(aligned[name]) - wide(base[name])
            basis = column_basis(delta, noise(aligned[name], base[name]), generator)
            row: dict[str, Any] = {"layer": name, "out": len(b), "rank": basis.shape[1], "cosine": None, "ratio": None}
            size = norm(b, a)
            if row["rank"] and size > 0:
                if projector == "exact":
                    image = b if row["rank"] == len(b) else basis @ (basis.T @ b)
                else:
                    image = delta @ (delta.T @ b) / delta.norm()
                images[name] = image
                row["ratio"] = norm(image, a) / size
                row["cosine"] = inner(image, b, a) / max(norm(image, a) * size, torch.finfo(torch.double).tiny)
            table.append(row)
            progress.advance(task)
    if not any(row["rank"] for row in table):
        raise UsageError("the aligned and the base model have the same weights; give other --aligned and --base")
    order = sorted((row for row in table if row["cosine"] is not None), key=lambda row: row["cosine"])
    lowest = order[:number] if threshold is None else [row for row in order if row["cosine"] <= threshold]
    chosen = {row["layer"] for row in lowest}
    for row in table:
        row["projected"] = row["layer"] in chosen
    return {name: images[name].to(b) if name in chosen else b for name, (_, b) in adapter.items()}, table


def column_basis(delta: torch.Tensor, noise: float, generator: torch.Generator) -> torch.Tensor:
    """An orthonormal basis [out, k] of the columns of `delta` [out, in], without singular values up to `noise` plus the
    rounding error of the largest.

    Random combinations of the columns span them if they outnumber the rank, and the SVD of a projection to their span
    gives the rank. Where the rank is not small, the SVD of `delta` itself costs no more.
    """
    out, width = delta.shape

    def count(s: torch.Tensor) -> int:
        return int((s > noise + 16 * torch.finfo(s.dtype).eps * s[0]).sum())

    probes = 32
    while probes < min(out, width) // 4:
        draw = torch.randn(width, probes, generator=generator, dtype=delta.dtype).to(delta.device)
        q = torch.linalg.qr(delta @ draw).Q
        u, s, _ = torch.linalg.svd(q.T @ delta, full_matrices=False)
        rank = count(s)
        if rank <= probes - 8:
            return q @ u[:, :rank]
        probes *= 4
    u, s, _ = torch.linalg.svd(delta, full_matrices=False)
    return u[:, : count(s)]


def noise(aligned: torch.Tensor, base: torch.Tensor) -> float:
    """The largest singular value that rounding alone may give the difference of two weights [out, in].

    A rounding error is uniform with a std t_ij of at most 0.29 eps |w_ij|, and a matrix of such independent entries has
    no singular value much above the sum of the largest norms of a row and a column of t; the factor of 2 is for sums
    that were rounded several times. An aligned weight from a half-precision checkpoint was rounded to that precision,
    whatever its dtype now; a half-precision base adds no error to the difference.
    """
    narrow = [t for t in (torch.bfloat16, torch.float16) if torch.equal(aligned.to(t).to(aligned.dtype), aligned)]
    eps = max(torch.finfo(t).eps for t in (aligned.dtype, base.dtype, *narrow))
    size = max(float(wide(w).norm(dim=0).max() + wide(w).norm(dim=1).max()) for w in (aligned, base))
    return 0.6 * eps * size


def inner(x: torch.Tensor, y: torch.Tensor, a: torch.Tensor) -> float:
    """<X A, Y A> of X, Y [out, r] and A [r, in], in fp64 and without the products."""
    a = a.double()
    return float((x.double() @ (a @ a.T) * y.double()).sum())


def norm(x: torch.Tensor, a: torch.Tensor) -> float:
    """||X A||."""
    return max(inner(x, x, a), 0.0) ** 0.5
