"""Figures of single runs: of a selector, a screening, an analysis or a choice of strength."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from tunevax.report import figures as fig
from tunevax.report.figures import COLOURS, DOTTED, INK, MARKERS_EDGED, PAPER, SOFT
from tunevax.report.provenance import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BINS = 30  # of a histogram
MAP_COLUMNS = 50  # with more logged steps, each column is the mean of several
DOTS: dict[str, Any] = {"color": INK, "linestyle": "none", "markeredgecolor": PAPER}
"""Markers with a ring of paper, visible on the darkest cell, on screen and in print."""


def _cell_size(axes: Axes, columns: int, rows: int) -> float:
    """The shorter side of a cell of a map, in points."""
    width, height = (side * 72 / axes.figure.dpi for side in axes.bbox.size)
    return min(width / columns, height / rows)


def layer_map(key: str, label: str, run: Run) -> str | None:
    """The sampling probability of each block, and the perturbed blocks, over training; None without such a log."""
    rows = [r for r in run.log if isinstance(r.get("probabilities"), list) and r["probabilities"]]
    if not rows or len({len(r["probabilities"]) for r in rows}) > 1:
        return None
    import numpy as np
    from matplotlib.colors import to_rgb

    blocks = len(rows[0]["probabilities"])
    stride = math.ceil(len(rows) / MAP_COLUMNS)
    bins = [rows[i : i + stride] for i in range(0, len(rows), stride)]
    probability = np.array([np.mean([r["probabilities"] for r in b], axis=0) for b in bins]).T
    chosen = np.array([[np.mean([i in (r.get("selected") or []) for r in b]) for b in bins] for i in range(blocks)])
    figure, axes = fig.panel([], height=min(4.6, 1.5 + 0.13 * max(blocks, 8)))
    top = float(probability.max()) or 1.0
    shade = np.zeros((*probability.shape, 4))
    shade[..., :3] = to_rgb(COLOURS[0])
    shade[..., 3] = 0.9 * probability / top  # transparent where unlikely, so the page's own colour shows through
    first, last = rows[0].get("step", 0), rows[-1].get("step", len(rows))
    half = (last - first) / max(len(bins) - 1, 1) / 2 or 0.5
    extent = (first - half, last + half, blocks - 0.5, -0.5)
    axes.imshow(shade, aspect="auto", interpolation="none", extent=extent)
    y, x = np.nonzero(chosen)
    centres = np.linspace(first, last, len(bins))
    size = min(5.0, 0.6 * _cell_size(axes, len(bins), blocks))
    for quarter in (1, 2, 3, 4):  # of the steps that share a cell: a few sizes, drawn as markers, keep the file small
        here = np.ceil(4 * chosen[y, x] - 1e-9) == quarter
        dot = {"markersize": size * math.sqrt(quarter / 4), "markeredgewidth": 0.35, "clip_on": False, **DOTS}
        axes.plot(centres[x[here]], y[here], "o", **dot)
    axes.set_xlabel("training steps")
    ticks = fig.thin(list(range(blocks)), 9)
    axes.set_yticks(ticks, [str(i) for i in ticks])
    axes.grid(False)
    fig.y_title(axes, f"block (fullest colour: probability {top:.2f})")
    most = ", ".join(str(int(i)) for i in np.argsort(-chosen.mean(axis=1))[:3])
    text = f"{blocks} blocks over {last} steps; most often selected: blocks {most}."
    return fig.as_svg(figure, key, f"Layer importance over training, {label}", text)


def histogram(key: str, title: str, kept: list[float], dropped: list[float]) -> str:
    """Scores of the rows that were kept, upwards and filled, and of those that were not, downwards and hollow."""
    import numpy as np

    both = np.array([*kept, *dropped])
    low, high = np.quantile(both, [0.005, 0.995])
    cut = float(np.ptp(both)) > 3 * (high - low) > 0  # outliers would put all others into one bar
    low, high = (low, high) if cut else (both.min(), both.max())
    edges = np.linspace(low, high, BINS + 1) if high > low else np.array([low - 0.5, low + 0.5])
    figure, axes = fig.panel([])
    heights = [np.histogram(np.clip(part, edges[0], edges[-1]), edges)[0] for part in (kept, dropped)]
    look: dict[str, Any] = {"width": 0.92 * np.diff(edges), "align": "edge", "linewidth": 0.7}
    axes.bar(edges[:-1], heights[0], color=COLOURS[0], alpha=0.55, **look)
    for sign, counts in zip((1, -1), heights, strict=True):
        axes.bar(edges[:-1], sign * counts, color="none", edgecolor=INK, **look)
    axes.axhline(0, color=INK, linewidth=0.8)
    top = 1.35 * max(1, *heights[0], *heights[1])  # room for the words above and below the bars
    bottom = -top if dropped else -0.06 * top
    axes.set_ylim(bottom, top)
    axes.locator_params(axis="y", integer=True, nbins=7)
    axes.set_yticks(axes.get_yticks(), [f"{abs(y):,.0f}" for y in axes.get_yticks()])
    axes.set_ylim(bottom, top)
    texts = []
    for side, va, name, part in ((0.985, "top", "kept", kept), (0.015, "bottom", "not kept", dropped)):
        if part:
            ends = f"scores from {min(part):.4g} to {max(part):.4g}, median {np.median(part):.4g}"
            texts.append(f"{len(part)} rows {name}, {ends}")
            axes.text(0.012, side, f"{name}: {len(part):,}", color=INK, fontsize=9.5, transform=axes.transAxes, va=va)
    axes.set_xlabel("score" + (" (the outermost bars include all beyond)" if cut else ""))
    fig.y_title(axes, "rows")
    return fig.as_svg(figure, key, title, "; ".join(texts))


def head_map(
    key: str, title: str, cells: list[list[float | None]], dots: set[tuple[int, int]], middle: float, top: float,
    ylabel: str, text: str,
) -> str:  # fmt: skip
    """A number per (layer, head), None where unknown: the further from `middle`, up to `top`, the more colour, orange
    above and blue below; and a dot on the pairs in `dots`, which needs no colour."""
    import numpy as np
    from matplotlib.colors import to_rgb

    values = np.array([[np.nan if v is None else v for v in layer] for layer in cells], dtype=float).T
    heads, layers = values.shape
    figure, axes = fig.panel([], height=min(4.6, 1.5 + 0.13 * max(heads, 8)))
    share = np.clip(np.nan_to_num(np.abs(values - middle)) / (top or 1.0), 0, 1)
    shade = np.zeros((heads, layers, 4))
    for colour, where in ((COLOURS[0], values < middle), (COLOURS[1], values >= middle)):
        shade[where, :3] = to_rgb(colour)
    shade[..., 3] = 0.9 * share  # transparent in the middle, so the page's own colour shows through
    axes.imshow(shade, aspect="auto", interpolation="none", extent=(-0.5, layers - 0.5, heads - 0.5, -0.5))
    x, y = [layer for layer, _ in sorted(dots)], [head for _, head in sorted(dots)]
    axes.plot(x, y, "o", markersize=min(7.0, 0.6 * _cell_size(axes, layers, heads)), markeredgewidth=0.4, **DOTS)
    for set_ticks, count, most in ((axes.set_xticks, layers, 12), (axes.set_yticks, heads, 9)):
        ticks = fig.thin(list(range(count)), most)
        set_ticks(ticks, [str(i) for i in ticks])
    axes.set_xlabel("layer")
    axes.grid(False)
    fig.y_title(axes, ylabel)
    return fig.as_svg(figure, key, title, text)


def scatter(
    key: str, title: str, points: list[tuple[float, float, bool]], limits: tuple[float, float], labels: tuple[str, str]
) -> str:
    """(x, y, flagged) as filled diamonds and hollow circles, with a dotted line at each limit."""
    figure, axes = fig.panel([])
    hollow: dict[str, Any] = {"marker": "o", "markerfacecolor": "none", "markeredgecolor": SOFT, "markersize": 4.5}
    filled: dict[str, Any] = {"marker": "D", "color": COLOURS[1], "markeredgecolor": INK, "markersize": 5.5}
    for flagged, style in ((False, hollow), (True, filled)):
        x, y = ([point[axis] for point in points if point[2] == flagged] for axis in (0, 1))
        axes.plot(x, y, linestyle="none", markeredgewidth=0.8, clip_on=False, **style)
    axes.axvline(limits[0], **DOTTED)
    axes.axhline(limits[1], **DOTTED)
    axes.set_xlabel(labels[0])
    fig.y_title(axes, labels[1])
    count = sum(flagged for *_, flagged in points)
    text = f"{count} of {len(points)} drawn rows are flagged; the limits are {limits[0]:.2f} and {limits[1]:.2f}"
    return fig.as_svg(figure, key, title, text)


def sweep(
    key: str, title: str, series: dict[str, list[tuple[float, dict[str, float]]]], target: float, chosen: float | None
) -> str:
    """Scores, {name: [(strength, score)]}, over the strength, the first of them in ink; a dotted line at the target of
    the harmful score and at the chosen strength."""
    look = fig.styles(list(series), next(iter(series), None))
    figure, axes = fig.panel(list(series))
    for name, points in series.items():
        style, x = look[name], [x for x, _ in points]
        low, high = ([s.get(end, s["value"]) for _, s in points] for end in ("low", "high"))
        axes.fill_between(x, low, high, color=style["color"], alpha=0.08, lw=0)
        axes.plot(x, [s["value"] for _, s in points], **MARKERS_EDGED, **style)
    fig.share_axis(axes, "y", "share of outputs")
    strengths = sorted({x for points in series.values() for x, _ in points})
    reach = (strengths[-1] - strengths[0]) or 1.0
    axes.set_xlim(strengths[0] - 0.04 * reach, strengths[-1] + 0.04 * reach)
    ticks = fig.apart(axes, strengths)
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.set_xlabel("strength")
    axes.axhline(target, **DOTTED)
    if chosen is not None:
        axes.axvline(chosen, **DOTTED)
    fig.end_labels(axes, [(name, points[-1][0], points[-1][1]["value"]) for name, points in series.items()], look)
    ends = ((name, *points[0], *points[-1]) for name, points in series.items())
    text = "; ".join(f"{n} {a['value']:.0%} at strength {x:g}, {b['value']:.0%} at {y:g}" for n, x, a, y, b in ends)
    return fig.as_svg(figure, key, title, text)


def heads_and_harm(key: str, title: str, points: list[tuple[str, int, float]]) -> str:
    """(model, positive heads, harmful score), a marker for each model."""
    labels = [label for label, _, _ in points]
    look = fig.styles(labels, None)
    figure, axes = fig.panel(labels)
    for label, x, y in points:
        style = {k: v for k, v in look[label].items() if k in ("color", "marker", "zorder")}
        axes.plot([x], [y], linestyle="none", markersize=7, markeredgecolor=INK, markeredgewidth=0.6, **style)
    fig.share_axis(axes, "y", "harmful outputs")
    axes.margins(x=0.12)
    axes.locator_params(axis="x", integer=True, nbins=6)
    axes.set_xlabel("heads with positive divergence")
    fig.end_labels(axes, points, look)
    text = "; ".join(f"{label}: {x} positive heads, {y:.0%} harmful" for label, x, y in points)
    return fig.as_svg(figure, key, title, text)
