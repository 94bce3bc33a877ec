"""Figures as SVG strings, drawn to stay readable without colour and on a dark page.

Each is a small panel of its own, so that a narrow page can stack panels instead of shrinking text. Ink, paper
and series colours are CSS variables with a fallback; the page sets them. Models keep one colour (Okabe and
Ito's set, told apart under colour blindness), one dash and one marker in every figure; the control is ink,
thick and solid.
"""

import html
import io
import math
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from tunevax.evidence.results import Cell, Point
    from tunevax.report.provenance import Run

INK, SOFT, GRID, PAPER = "#1d1d1b", "#6b6a66", "#dcdad4", "#fefdfb"
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]
VARIABLES = {INK: "ink", SOFT: "soft", GRID: "grid", PAPER: "paper"} | {c: f"c{i}" for i, c in enumerate(COLOURS)}
DASHES = ["--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (2, 1))]
MARKERS = ["s", "^", "D", "v", "P", "X"]
WIDTH, HEIGHT = 5.3, 3.3  # inches: one panel is 382 x 238 points
FONT = r" font-family: [^;]*;"  # the page sets it
BINS = 30  # of a histogram
MAP_COLUMNS = 50  # with more logged steps than this, several equally many share a column


def styles(models: list[str], control: str | None) -> dict[str, dict[str, Any]]:
    """Line style of each model, the same in every figure. The control is drawn in ink."""
    found: dict[str, dict[str, Any]] = {}
    rest = 0
    for model in models:
        if model == control:
            found[model] = {"color": INK, "linestyle": "-", "marker": "o", "linewidth": 2.2, "zorder": 3}
            continue
        i = rest % len(COLOURS)
        found[model] = {
            "color": COLOURS[i],
            "linestyle": DASHES[(rest + rest // len(COLOURS)) % len(DASHES)],
            "marker": MARKERS[i],
            "linewidth": 1.6,
            "zorder": 4,
        }
        rest += 1
    return found


def curves(
    key: str, cells: list["Cell"], score: str, look: dict[str, dict[str, Any]], ylabel: str, phi: float | None = None
) -> str:
    """Score against attack steps, a line per model with its interval, and a dotted line at `phi`.

    `key` makes ids unique on the page.
    """
    drawn = [(cell, cell.curve(score)) for cell in cells]
    drawn = [(cell, points) for cell, points in drawn if points]
    figure, axes = _panel([cell.model for cell, _ in drawn])
    steps = sorted({p.step for _, points in drawn for p in points})
    for cell, points in drawn:
        style, x = look[cell.model], [p.step for p in points]
        axes.fill_between(
            x,
            [p.low for p in points],
            [p.high for p in points],
            color=style["color"],
            alpha=0.11 if len(drawn) < 6 else 0.05,
            lw=0,
        )
        axes.plot(x, [p.value for p in points], markersize=4.5, markeredgecolor=PAPER, markeredgewidth=0.6, **style)
    _share_axis(axes, "y", ylabel)
    axes.set_xscale("symlog", base=2, linthresh=next((s for s in steps if s > 0), 1), linscale=0.6)
    axes.set_xlim(steps[0], max(steps[-1], 1) * 1.06)
    shown = _apart(axes, steps)
    axes.set_xticks(shown, [f"{s:,}" for s in shown])
    axes.minorticks_off()
    batch = {cell.batch for cell, _ in drawn}
    each = f" ({batch.pop()} samples each)" if len(batch) == 1 and None not in batch else ""
    axes.set_xlabel(f"attack steps{each}")
    if phi is not None:
        _phi_line(axes, phi)
    _end_labels(axes, [(cell.model, points[-1].step, points[-1].value) for cell, points in drawn], look)
    told = "; ".join(f"{c.model} {p[0]} at step {p[0].step}, {p[-1]} at step {p[-1].step}" for c, p in drawn)
    return _svg(figure, key, f"{ylabel} against attack steps, {cells[0].attack} attack", told)


def trajectory(
    key: str, cells: list["Cell"], score: str, task: str, look: dict[str, dict[str, Any]], phi: float
) -> str:
    """Harmful score against benign task accuracy, step after step: learning slowly is not resisting."""
    figure, axes = _panel([cell.model for cell in cells])
    ends = []
    for cell in cells:
        pairs = [(cell.at(task, p.step), p) for p in cell.curve(score)]
        pairs = [(t, h) for t, h in pairs if t]
        if not pairs:
            continue
        style, x, y = look[cell.model], [t.value for t, _ in pairs], [h.value for _, h in pairs]
        axes.plot(x, y, markersize=4.5, markeredgecolor=PAPER, markeredgewidth=0.6, clip_on=False, **style)
        axes.plot(x[:1], y[:1], "o", ms=9, mfc="none", mec=style["color"], mew=1.2, clip_on=False, zorder=5)
        ends.append((cell.model, x[-1], y[-1]))
    _share_axis(axes, "y", "harmful outputs")
    _share_axis(axes, "x", "benign task accuracy")
    _phi_line(axes, phi)
    _end_labels(axes, ends, look)
    told = "; ".join(f"{m} ends at {x:.0%} task accuracy and {y:.0%} harmful" for m, x, y in ends)
    return _svg(figure, key, f"Harmful score against benign task accuracy, {cells[0].attack} attack", told)


def profile(
    key: str,
    series: list[tuple[str, list[tuple[float, "Point"]]]],
    xlabel: str,
    look: dict[str, dict[str, Any]],
    phi: float,
) -> str:
    """Harmful score of each model, (model, [(x, point)]), over what was tried in turn: a block, or a dose."""
    figure, axes = _panel([model for model, _ in series])
    places = sorted({x for _, points in series for x, _ in points})
    reach = (places[-1] - places[0]) or 1.0
    for i, (model, points) in enumerate(series):
        x = [x + 0.012 * reach * (i - (len(series) - 1) / 2) for x, _ in points]  # whiskers side by side
        y = [p.value for _, p in points]
        bars = [[p.value - p.low for _, p in points], [p.high - p.value for _, p in points]]
        style = look[model]
        axes.errorbar(x, y, bars, fmt="none", ecolor=style["color"], elinewidth=1, alpha=0.6, zorder=2)
        axes.plot(x, y, markersize=4.5, markeredgecolor=PAPER, markeredgewidth=0.6, **style)
    _share_axis(axes, "y", "harmful outputs")
    axes.set_xlim(places[0] - 0.05 * reach, places[-1] + 0.05 * reach)
    shown = thin(places)
    axes.set_xticks(shown, [f"{x:g}" for x in shown])
    axes.set_xlabel(xlabel)
    _phi_line(axes, phi)
    _end_labels(axes, [(model, points[-1][0], points[-1][1].value) for model, points in series], look)
    told = "; ".join(
        f"{model} worst at {xlabel} {x:g}, {p}" for model, (x, p) in ((m, max(f, key=_value)) for m, f in series)
    )
    return _svg(figure, key, f"Harmful score over {xlabel}", told)


def _value(pair: tuple[float, "Point"]) -> float:
    return pair[1].value


def layer_map(key: str, label: str, run: "Run") -> str | None:
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
    figure, axes = _panel([], height=min(4.6, 1.5 + 0.13 * max(blocks, 8)))
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
    return _svg(figure, key, f"Layer importance over training, {label}", told)


def bars(key: str, rows: list[tuple[str, float | None, str]], title: str) -> str:
    """Horizontal bars of (label, value, the value as text); a value of None is told, not drawn as 0."""
    figure, axes = _panel([], height=0.4 + 0.3 * len(rows), left=max((len(_short(r[0])) for r in rows), default=4))
    top = max((v for _, v, _ in rows if v), default=1.0)
    for i, (_, value, text) in enumerate(rows):
        if value is not None:
            axes.barh(i, value, height=0.62, color=COLOURS[0], alpha=0.55, edgecolor=INK, linewidth=0.8)
        axes.text((value or 0) + 0.015 * top, i, text, va="center", color=INK, fontsize=9.5)
    axes.set_yticks(range(len(rows)), [_short(label) for label, _, _ in rows], parse_math=False)
    axes.set_ylim(len(rows) - 0.45, -0.55)
    room = 5.8 * max((len(text) for _, _, text in rows), default=0) / (axes.get_position().width * WIDTH * 72)
    axes.set_xlim(0, 1.03 * top / max(0.2, 1 - room))
    axes.set_xticks([])
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.spines["bottom"].set_visible(False)
    axes.grid(False)
    return _svg(figure, key, title, "; ".join(f"{label}: {text}" for label, _, text in rows))


def histogram(key: str, title: str, kept: list[float], dropped: list[float]) -> str:
    """Scores of the rows that were kept, upwards and filled, and of those that were not, downwards and hollow."""
    import numpy as np

    both = np.array([*kept, *dropped])
    low, high = np.quantile(both, [0.005, 0.995])
    cut = float(np.ptp(both)) > 3 * (high - low) > 0  # a few outliers would leave all others in one bar
    low, high = (low, high) if cut else (both.min(), both.max())
    edges = np.linspace(low, high, BINS + 1) if high > low else np.array([low - 0.5, low + 0.5])
    figure, axes = _panel([])
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
    return _svg(figure, key, title, told)


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
    figure, axes = _panel([], height=min(4.6, 1.5 + 0.13 * max(heads, 8)))
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
    return _svg(figure, key, title, told)


def scatter(
    key: str, title: str, points: list[tuple[float, float, bool]], limits: tuple[float, float], labels: tuple[str, str]
) -> str:
    """(x, y, whether it stands out) as filled diamonds and hollow circles, with a dotted line at each limit."""
    figure, axes = _panel([])
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
    return _svg(figure, key, title, told)


def sweep(
    key: str, title: str, series: dict[str, list[tuple[float, dict[str, float]]]], target: float, chosen: float | None
) -> str:
    """Scores, {name: [(strength, score)]}, over the strength, the first of them in ink; a dotted line at the target of
    the harmful score and at the chosen strength."""
    look = styles(list(series), next(iter(series), None))
    figure, axes = _panel(list(series))
    for name, points in series.items():
        style, x = look[name], [x for x, _ in points]
        low, high = ([s.get(end, s["value"]) for _, s in points] for end in ("low", "high"))
        axes.fill_between(x, low, high, color=style["color"], alpha=0.08, lw=0)
        axes.plot(
            x, [s["value"] for _, s in points], markersize=4.5, markeredgecolor=PAPER, markeredgewidth=0.6, **style
        )
    _share_axis(axes, "y", "share of outputs")
    strengths = sorted({x for points in series.values() for x, _ in points})
    reach = (strengths[-1] - strengths[0]) or 1.0
    axes.set_xlim(strengths[0] - 0.04 * reach, strengths[-1] + 0.04 * reach)
    shown = _apart(axes, strengths)
    axes.set_xticks(shown, [f"{x:g}" for x in shown])
    axes.set_xlabel("strength")
    _phi_line(axes, target)
    if chosen is not None:
        axes.axvline(chosen, color=SOFT, linewidth=1, linestyle=(0, (1, 2)), zorder=1)
    _end_labels(axes, [(name, points[-1][0], points[-1][1]["value"]) for name, points in series.items()], look)
    told = "; ".join(
        f"{name} {points[0][1]['value']:.0%} at strength {points[0][0]:g}, {points[-1][1]['value']:.0%} at "
        f"{points[-1][0]:g}"
        for name, points in series.items()
    )
    return _svg(figure, key, title, told)


def heads_and_harm(key: str, title: str, points: list[tuple[str, int, float]]) -> str:
    """(model, positive heads, harmful score), a marker for each model."""
    labels = [label for label, _, _ in points]
    look = styles(labels, None)
    figure, axes = _panel(labels)
    for label, x, y in points:
        style = {k: v for k, v in look[label].items() if k in ("color", "marker", "zorder")}
        axes.plot([x], [y], linestyle="none", markersize=7, markeredgecolor=INK, markeredgewidth=0.6, **style)
    _share_axis(axes, "y", "harmful outputs")
    axes.margins(x=0.12)
    axes.xaxis.get_major_locator().set_params(integer=True, nbins=6)
    axes.set_xlabel("heads with positive divergence")
    _end_labels(axes, points, look)
    told = "; ".join(f"{label}: {x} positive heads, {y:.0%} harmful" for label, x, y in points)
    return _svg(figure, key, title, told)


# ---------------------------------------------------------------------------------------------------- drawing


def _short(label: str) -> str:
    return label if len(label) <= 22 else label[:21] + "…"


def _panel(labels: list[str], height: float = HEIGHT, left: int = 0) -> tuple["Figure", "Axes"]:
    """A figure with room for `labels` right of the axes and for `left` characters before them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height))
    axes = figure.add_subplot()
    room = max((len(_short(label)) for label in labels), default=0)
    points = WIDTH * 72
    figure.subplots_adjust(
        left=(14 + 6.2 * left if left else 38) / points,
        right=1 - ((20 + 6.0 * room) if room else 8) / points,
        top=1 - (6 if left else 22) / (height * 72),
        bottom=(36 if not left else 6) / (height * 72),
    )
    axes.spines[["top", "right"]].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(SOFT)
        axes.spines[side].set_linewidth(0.8)
    axes.patch.set_visible(False)
    figure.patch.set_visible(False)
    axes.tick_params(colors=SOFT, labelsize=9.5, length=3, width=0.8)
    axes.xaxis.label.set(color=INK, fontsize=10)
    axes.grid(axis="y", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    return figure, axes


def _share_axis(axes: "Axes", which: str, label: str) -> None:
    """0 to 100 %, with a little air so that markers at the ends are whole."""
    ticks = [0, 0.25, 0.5, 0.75, 1]
    getattr(axes, f"set_{which}lim")(-0.025, 1.025)
    getattr(axes, f"set_{which}ticks")(ticks, [f"{100 * t:.0f} %" for t in ticks])
    if which == "y":  # above the axis, where it reads without turning one's head
        axes.set_title(label, loc="left", x=-36 / (axes.get_position().width * WIDTH * 72), color=INK, fontsize=10)
    else:
        axes.set_xlabel(label)


def _phi_line(axes: "Axes", phi: float) -> None:
    axes.axhline(phi, color=SOFT, linewidth=1, linestyle=(0, (1, 2)), zorder=1)


def thin(ticks: list[Any], most: int = 10) -> list[Any]:
    """At most about `most` of the ticks, the first and the last among them."""
    if len(ticks) <= most:
        return ticks
    stride = math.ceil((len(ticks) - 1) / (most - 1))
    return sorted({*ticks[::stride][: most - 1], ticks[-1]})


def _apart(axes: "Axes", steps: list[int], points: float = 26) -> list[int]:
    """Those of the steps that lie at least `points` apart on the axis, the first and the last among them."""
    place = {s: float(axes.transData.transform((s, 0))[0]) * 72 / axes.figure.dpi for s in steps}
    kept = [steps[-1]]
    for step in reversed(steps[:-1]):
        if place[kept[-1]] - place[step] >= points and (step == steps[0] or place[step] - place[steps[0]] >= points):
            kept.append(step)
    return kept if kept[-1] == steps[0] or len(steps) == 1 else [*kept, steps[0]]


def _end_labels(axes: "Axes", ends: list[tuple[str, float, float]], look: dict[str, dict[str, Any]]) -> None:
    """Names beside the lines' ends, moved apart where they would overlap, each with a hairline to its end."""
    box = axes.get_position()
    gap = 13 / (box.height * axes.figure.get_figheight() * 72)  # of the axes' height, for one line of text
    low, high = axes.get_ylim()
    ends = sorted(reversed(ends), key=lambda e: e[2])
    wanted = [(y - low) / (high - low) for _, _, y in ends]
    places = list(wanted)
    for _ in range(200):
        for i in range(len(places) - 1):
            overlap = gap - (places[i + 1] - places[i])
            if overlap > 1e-6:
                places[i] -= overlap / 2
                places[i + 1] += overlap / 2
        if places and places[-1] > 1:
            places[-1] = 1
        if places and places[0] < 0:
            places[0] = 0
    width = box.width * axes.figure.get_figwidth() * 72
    to_axes = axes.transScale + axes.transLimits
    for (model, x, y), place in zip(ends, places, strict=True):
        style = look[model]
        x_end, y_end = to_axes.transform((x, y))
        xs, ys = [x_end, 1 + 9 / width], [y_end, place]
        axes.plot(xs, ys, transform=axes.transAxes, color=style["color"], lw=0.7, clip_on=False, zorder=2)
        weight = "bold" if style["color"] == INK else "normal"
        axes.text(
            1 + 12 / width, place, _short(model), transform=axes.transAxes, va="center", fontsize=9.5,
            color=style["color"], fontweight=weight, parse_math=False,  # a model may be called "a_$b$"
        )  # fmt: skip


def _svg(figure: "Figure", key: str, title: str, told: str) -> str:
    """The figure as one <svg> element: text as text, colours as CSS variables, ids that start with `key`."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}  # leaves the metadata block out
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "tunevax"}):
        figure.savefig(buffer, format="svg", metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.S)
    text = re.sub(r'\bid="', f'id="{key}-', text)
    text = re.sub(r'href="#', f'href="#{key}-', text).replace("url(#", f"url(#{key}-")
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var(--{variable}, {colour})")
    box = re.search(r'viewBox="[^"]*"', text)
    head = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'{box.group()} role="img" aria-labelledby="{key}-title {key}-told">'
        f'<title id="{key}-title">{html.escape(title)}</title>'
        f'<desc id="{key}-told">{html.escape(told)}</desc>'
    )
    body = text[text.index(">") + 1 :]
    return re.sub(r">\s*\n\s*<", "><", head + _shorter(body, key))


def _shorter(body: str, key: str) -> str:
    """The same drawing in half the bytes: styles that repeat become classes, and what nothing uses goes."""
    counts = Counter(re.findall(r' style="([^"]*)"', re.sub(FONT, "", body)))
    classes = {style: f"{key}-s{i}" for i, style in enumerate(style for style, n in counts.items() if n > 1)}

    def shorter(tag: re.Match) -> str:  # tags only: a model may be called "v1.2345"
        short = re.sub(FONT, "", re.sub(r"\s+", " ", tag[0]))
        short = re.sub(r"(\d+\.\d{2})\d+", r"\1", short).replace(' transform="rotate(-0 ', ' data-="')
        short = re.sub(r' data-="[^"]*"', "", re.sub(r'^<g id="[^"]*"', "<g", short))
        return re.sub(r'style="([^"]*)"', lambda m: f'class="{classes[m[1]]}"' if m[1] in classes else m[0], short)

    body = re.sub(r"<[^>]+>", shorter, body)
    rules = "".join(f".{name}{{{style}}}" for style, name in classes.items())
    return f"<style>{rules}</style>{body}"
