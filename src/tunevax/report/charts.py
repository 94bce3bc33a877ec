"""Figures of single runs: what a selector, a screen, an analysis or a choice of strength recorded."""

from __future__ import annotations

import math

from tunevax.report.figures import (
    COLOURS,
    INK,
    PAPER,
    SOFT,
    WIDTH,
    _apart,
    _end_labels,
    as_svg,
    panel,
    phi_line,
    share_axis,
    styles,
    thin,
)
from tunevax.report.provenance import Run

BINS = 30  # of a histogram


MAP_COLUMNS = 50  # with more logged steps than this, several equally many share a column


def layer_map(key: str, label: str, run: Run) -> str | None:
    """Which blocks T-Vaccine thought important, and perturbed, over training; None without such a log."""
    rows = [r for r in run.log if isinstance(r.get("probabilities"), list) and r["probabilities"]]
    if not rows or len({len(r["probabilities"]) for r in rows}) > 1:
        return None
    import numpy as np

    blocks = len(rows[0]["probabilities"])
    stride = math.ceil(len(rows) / MAP_COLUMNS)
    bins = [rows[i : i + stride] for i in range(0, len(rows), stride)]
    probability = np.array([np.mean([r["probabilities"] for r in b], axis=0) for b in bins]).T
    chosen = np.array([[np.mean([i in (r.get("selected") or []) for r in b]) for b in bins] for i in range(blocks)])
    figure, axes = panel([], height=min(4.6, 1.5 + 0.13 * max(blocks, 8)))
    top = float(probability.max()) or 1.0
    shade = np.zeros((*probability.shape, 4))
    shade[..., :3] = [int(COLOURS[0][i : i + 2], 16) / 255 for i in (1, 3, 5)]
    shade[..., 3] = 0.9 * probability / top  # transparent where unlikely, so the page's own colour shows through
    first, last = rows[0].get("step", 0), rows[-1].get("step", len(rows))
    half = (last - first) / max(len(bins) - 1, 1) / 2 or 0.5
    extent = (first - half, last + half, blocks - 0.5, -0.5)
    axes.imshow(shade, aspect="auto", interpolation="none", extent=extent)
    y, x = np.nonzero(chosen)
    centres = np.linspace(first, last, len(bins))
    place = axes.get_position()
    cell = min(place.width * WIDTH / len(bins), place.height * figure.get_figheight() / blocks) * 72  # points
    size = min(5.0, 0.6 * cell)
    # A ring of paper keeps the dot visible on the darkest cell, on screen and in print.
    ring = {"color": INK, "linestyle": "none", "markeredgecolor": PAPER, "markeredgewidth": 0.35, "clip_on": False}
    for quarter in (1, 2, 3, 4):  # of the steps that share a cell: a few sizes, drawn as markers, keep the file small
        here = np.ceil(4 * chosen[y, x] - 1e-9) == quarter
        axes.plot(centres[x[here]], y[here], "o", markersize=size * math.sqrt(quarter / 4), **ring)
    axes.set_xlabel("training steps")
    shown = thin(list(range(blocks)), 9)
    axes.set_yticks(shown, [str(i) for i in shown])
    axes.grid(False)
    left = -36 / (axes.get_position().width * WIDTH * 72)
    axes.set_title(f"block (fullest colour: probability {top:.2f})", loc="left", x=left, color=INK, fontsize=10)
    most = [int(i) for i in np.argsort(-chosen.mean(axis=1))[:3]]
    told = f"{blocks} blocks over {last} steps; most often selected: blocks {', '.join(map(str, most))}."
    return as_svg(figure, key, f"Layer importance over training, {label}", told)


def histogram(key: str, title: str, kept: list[float], dropped: list[float]) -> str:
    """Scores of the rows that were kept, upwards and filled, and of those that were not, downwards and hollow."""
    import numpy as np

    both = np.array([*kept, *dropped])
    low, high = np.quantile(both, [0.005, 0.995])
    cut = float(np.ptp(both)) > 3 * (high - low) > 0  # a few outliers would leave all others in one bar
    low, high = (low, high) if cut else (both.min(), both.max())
    edges = np.linspace(low, high, BINS + 1) if high > low else np.array([low - 0.5, low + 0.5])
    figure, axes = panel([])
    heights = [np.histogram(np.clip(part, edges[0], edges[-1]), edges)[0] for part in (kept, dropped)]
    look = {"width": 0.92 * np.diff(edges), "align": "edge", "linewidth": 0.7}
    axes.bar(edges[:-1], heights[0], color=COLOURS[0], alpha=0.55, **look)
    for sign, counts in zip((1, -1), heights, strict=True):
        axes.bar(edges[:-1], sign * counts, color="none", edgecolor=INK, **look)
    axes.axhline(0, color=INK, linewidth=0.8)
    top = 1.35 * max(1, *heights[0], *heights[1])  # room for the words above and below the bars
    axes.set_ylim(-top if dropped else -0.06 * top, top)
    axes.yaxis.get_major_locator().set_params(integer=True, nbins=7)
    axes.set_yticks(axes.get_yticks(), [f"{abs(y):,.0f}" for y in axes.get_yticks()])
    axes.set_ylim(-top if dropped else -0.06 * top, top)
    for side, text, part in ((0.985, "kept", kept), (0.015, "not kept", dropped)):
        if part:
            where = {"transform": axes.transAxes, "ha": "left", "va": "top" if side > 0.5 else "bottom"}
            axes.text(0.012, side, f"{text}: {len(part):,}", color=INK, fontsize=9.5, **where)
    axes.set_xlabel("score" + (" (the outermost bars hold all beyond)" if cut else ""))
    axes.set_title("rows", loc="left", x=-36 / (axes.get_position().width * WIDTH * 72), color=INK, fontsize=10)
    told = "; ".join(
        f"{len(part)} rows {text}, scores from {min(part):.4g} to {max(part):.4g}, median {np.median(part):.4g}"
        for text, part in (("kept", kept), ("not kept", dropped))
        if part
    )
    return as_svg(figure, key, title, told)


def head_map(
    key: str, title: str, cells: list[list[float | None]], dots: set[tuple[int, int]], middle: float, top: float,
    ylabel: str, told: str,
) -> str:  # fmt: skip
    """A number per (layer, head): the further from `middle`, the more colour, orange above and blue below; a dot on
    the pairs in `dots`, so that what matters is seen without colour.

    Args:
        cells: [layers][heads]; None where nothing is known.
        top: distance from the middle of the fullest colour.
    """
    import numpy as np

    values = np.array([[np.nan if v is None else v for v in layer] for layer in cells], dtype=float).T
    heads, layers = values.shape
    figure, axes = panel([], height=min(4.6, 1.5 + 0.13 * max(heads, 8)))
    share = np.clip(np.nan_to_num(np.abs(values - middle)) / (top or 1.0), 0, 1)
    shade = np.zeros((heads, layers, 4))
    for colour, where in ((COLOURS[0], values < middle), (COLOURS[1], values >= middle)):
        shade[where, :3] = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    shade[..., 3] = 0.9 * share  # transparent in the middle, so the page's own colour shows through
    axes.imshow(shade, aspect="auto", interpolation="none", extent=(-0.5, layers - 0.5, heads - 0.5, -0.5))
    place = axes.get_position()
    cell = min(place.width * WIDTH / layers, place.height * figure.get_figheight() / heads) * 72  # points
    ring = {"color": INK, "linestyle": "none", "markeredgecolor": PAPER, "markeredgewidth": 0.4}
    y, x = [head for _, head in sorted(dots)], [layer for layer, _ in sorted(dots)]
    axes.plot(x, y, "o", markersize=min(7.0, 0.6 * cell), **ring)
    for ticks, name in ((layers, "x"), (heads, "y")):
        shown = thin(list(range(ticks)), 12 if name == "x" else 9)
        getattr(axes, f"set_{name}ticks")(shown, [str(i) for i in shown])
    axes.set_xlabel("layer")
    axes.grid(False)
    axes.set_title(ylabel, loc="left", x=-36 / (place.width * WIDTH * 72), color=INK, fontsize=10)
    return as_svg(figure, key, title, told)


def scatter(
    key: str, title: str, points: list[tuple[float, float, bool]], limits: tuple[float, float], labels: tuple[str, str]
) -> str:
    """(x, y, whether it stands out) as filled diamonds and hollow circles, with a dotted line at each limit."""
    figure, axes = panel([])
    for flagged, style in (
        (False, {"marker": "o", "markerfacecolor": "none", "markeredgecolor": SOFT, "markersize": 4.5}),
        (True, {"marker": "D", "color": COLOURS[1], "markeredgecolor": INK, "markersize": 5.5}),
    ):
        found = [(x, y) for x, y, f in points if f == flagged]
        axes.plot(
            [x for x, _ in found], [y for _, y in found], linestyle="none", markeredgewidth=0.8, clip_on=False, **style
        )
    for line, value in zip((axes.axvline, axes.axhline), limits, strict=True):
        line(value, color=SOFT, linewidth=1, linestyle=(0, (1, 2)), zorder=1)
    axes.set_xlabel(labels[0])
    axes.set_title(labels[1], loc="left", x=-36 / (axes.get_position().width * WIDTH * 72), color=INK, fontsize=10)
    count = sum(f for *_, f in points)
    told = f"{count} of {len(points)} drawn rows stand out; the limits are {limits[0]:.2f} and {limits[1]:.2f}"
    return as_svg(figure, key, title, told)


def sweep(
    key: str, title: str, series: dict[str, list[tuple[float, dict[str, float]]]], target: float, chosen: float | None
) -> str:
    """Scores, {name: [(strength, score)]}, over the strength, the first of them in ink; a dotted line at the target of
    the harmful score and at the chosen strength."""
    look = styles(list(series), next(iter(series), None))
    figure, axes = panel(list(series))
    for name, points in series.items():
        style, x = look[name], [x for x, _ in points]
        low, high = ([s.get(end, s["value"]) for _, s in points] for end in ("low", "high"))
        axes.fill_between(x, low, high, color=style["color"], alpha=0.08, lw=0)
        axes.plot(
            x, [s["value"] for _, s in points], markersize=4.5, markeredgecolor=PAPER, markeredgewidth=0.6, **style
        )
    share_axis(axes, "y", "share of outputs")
    strengths = sorted({x for points in series.values() for x, _ in points})
    reach = (strengths[-1] - strengths[0]) or 1.0
    axes.set_xlim(strengths[0] - 0.04 * reach, strengths[-1] + 0.04 * reach)
    shown = _apart(axes, strengths)
    axes.set_xticks(shown, [f"{x:g}" for x in shown])
    axes.set_xlabel("strength")
    phi_line(axes, target)
    if chosen is not None:
        axes.axvline(chosen, color=SOFT, linewidth=1, linestyle=(0, (1, 2)), zorder=1)
    _end_labels(axes, [(name, points[-1][0], points[-1][1]["value"]) for name, points in series.items()], look)
    told = "; ".join(
        f"{name} {points[0][1]['value']:.0%} at strength {points[0][0]:g}, {points[-1][1]['value']:.0%} at "
        f"{points[-1][0]:g}"
        for name, points in series.items()
    )
    return as_svg(figure, key, title, told)


def heads_and_harm(key: str, title: str, points: list[tuple[str, int, float]]) -> str:
    """(model, positive heads, harmful score), a marker for each model."""
    labels = [label for label, _, _ in points]
    look = styles(labels, None)
    figure, axes = panel(labels)
    for label, x, y in points:
        style = {k: v for k, v in look[label].items() if k in ("color", "marker", "zorder")}
        axes.plot([x], [y], linestyle="none", markersize=7, markeredgecolor=INK, markeredgewidth=0.6, **style)
    share_axis(axes, "y", "harmful outputs")
    axes.margins(x=0.12)
    axes.xaxis.get_major_locator().set_params(integer=True, nbins=6)
    axes.set_xlabel("heads with positive divergence")
    _end_labels(axes, points, look)
    told = "; ".join(f"{label}: {x} positive heads, {y:.0%} harmful" for label, x, y in points)
    return as_svg(figure, key, title, told)
