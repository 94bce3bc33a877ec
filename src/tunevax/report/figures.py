"""Figures as SVG strings, readable without colour and on a dark page.

Each is a small panel, so that a narrow page can stack panels instead of shrinking text. Ink, paper and series colours
are CSS variables with a fallback; the page sets them. A model has one colour (of Okabe and Ito's set, which can be
distinguished under colour blindness), one dash and one marker in every figure; the control is ink, thick and solid.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from tunevax.evidence.findings import Findings
from tunevax.evidence.results import Cell, Point, Results
from tunevax.records import is_share
from tunevax.report.blocks import HeatMap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, SOFT, GRID, PAPER = "#1d1d1b", "#6b6a66", "#dcdad4", "#fefdfb"
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]
VARIABLES = {INK: "ink", SOFT: "soft", GRID: "grid", PAPER: "paper"} | {c: f"c{i}" for i, c in enumerate(COLOURS)}
DASHES = ["--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (2, 1))]
MARKERS = ["s", "^", "D", "v", "P", "X"]
WIDTH, HEIGHT = 5.3, 3.3  # inches: one panel is 382 x 238 points
HEAT_COLUMNS = 8  # steps shown in a heat map
T = TypeVar("T", bound=float)
FONT = r" font-family: [^;]*;"  # the page sets it
DOTTED: dict[str, Any] = {"color": SOFT, "linewidth": 1, "linestyle": (0, (1, 2)), "zorder": 1}  # a line at a limit
Look = dict[str, dict[str, Any]]
"""Line styles by model, the same in every figure."""
Series = list[tuple[str, list[tuple[float, Point]]]]
"""(model, [(block or dose, its point)])."""
MARKERS_EDGED: dict[str, Any] = {"markersize": 4.5, "markeredgecolor": PAPER, "markeredgewidth": 0.6}


def styles(models: list[str], control: str | None) -> Look:
    """The line style of each model: the control in ink, the others by their position."""
    ink = {"color": INK, "linestyle": "-", "marker": "o", "linewidth": 2.2, "zorder": 3}
    look: Look = {control: ink} if control else {}
    for n, model in enumerate(model for model in models if model != control):
        dash, i = DASHES[(n + n // len(COLOURS)) % len(DASHES)], n % len(COLOURS)
        look[model] = {"color": COLOURS[i], "linestyle": dash, "marker": MARKERS[i], "linewidth": 1.6, "zorder": 4}
    return look


def curves(key: str, cells: list[Cell], score: str, look: Look, ylabel: str, phi: float | None = None) -> str:
    """Score against attack steps, a line per model with its interval, and a dotted line at `phi`. `key` starts ids."""
    drawn = [(cell, points) for cell in cells if (points := cell.curve(score))]
    figure, axes = panel([cell.model for cell, _ in drawn])
    steps = sorted({p.step for _, points in drawn for p in points})
    for cell, points in drawn:
        style, x, faint = look[cell.model], [p.step for p in points], 0.11 if len(drawn) < 6 else 0.05
        axes.fill_between(x, *intervals(points), color=style["color"], alpha=faint, lw=0)
        axes.plot(x, [p.value for p in points], **MARKERS_EDGED, **style)
    if is_share(score):
        share_axis(axes, "y", ylabel)
    else:
        y_title(axes, ylabel)
    axes.set_xscale("symlog", base=2, linthresh=next((s for s in steps if s > 0), 1), linscale=0.6)
    axes.set_xlim(steps[0], max(steps[-1], 1) * 1.06)
    ticks = apart(axes, steps)
    axes.set_xticks(ticks, [f"{s:,}" for s in ticks])
    axes.minorticks_off()
    batch = {cell.batch for cell, _ in drawn}
    each = f" ({batch.pop()} samples each)" if len(batch) == 1 and None not in batch else ""
    axes.set_xlabel(f"attack steps{each}")
    if phi is not None:
        axes.axhline(phi, **DOTTED)
    end_labels(axes, [(cell.model, points[-1].step, points[-1].value) for cell, points in drawn], look)
    put = str if is_share(score) else lambda point: f"{point.value:.2f}"
    text = "; ".join(f"{c.model} {put(p[0])} at step {p[0].step}, {put(p[-1])} at step {p[-1].step}" for c, p in drawn)
    return as_svg(figure, key, f"{ylabel} against attack steps, {cells[0].attack} attack", text)


def trajectory(key: str, cells: list[Cell], score: str, task: str, look: Look, phi: float) -> str:
    """Harmful score against benign task accuracy, step by step: slow learning is not resistance."""
    figure, axes = panel([cell.model for cell in cells])
    ends = []
    for cell in cells:
        if pairs := [(t.value, p.value) for p in cell.curve(score) if (t := cell.at(task, p.step))]:
            style, (x, y) = look[cell.model], zip(*pairs, strict=True)
            axes.plot(x, y, **MARKERS_EDGED, clip_on=False, **style)
            axes.plot(x[:1], y[:1], "o", ms=9, mfc="none", mec=style["color"], mew=1.2, clip_on=False, zorder=5)
            ends.append((cell.model, x[-1], y[-1]))
    share_axis(axes, "y", "harmful outputs")
    share_axis(axes, "x", "benign task accuracy")
    axes.axhline(phi, **DOTTED)
    end_labels(axes, ends, look)
    text = "; ".join(f"{m} ends at {x:.0%} task accuracy and {y:.0%} harmful" for m, x, y in ends)
    return as_svg(figure, key, f"Harmful score against benign task accuracy, {cells[0].attack} attack", text)


def profile(key: str, series: Series, xlabel: str, look: Look, phi: float) -> str:
    """Harmful score of each model over the blocks or doses that were tried."""
    figure, axes = panel([model for model, _ in series])
    places = sorted({x for _, points in series for x, _ in points})
    reach = (places[-1] - places[0]) or 1.0
    for i, (model, points) in enumerate(series):
        x = [x + 0.012 * reach * (i - (len(series) - 1) / 2) for x, _ in points]  # whiskers side by side
        y, style = [p.value for _, p in points], look[model]
        low, high = intervals([p for _, p in points])
        whiskers = [[v - e for v, e in zip(y, low, strict=True)], [e - v for v, e in zip(y, high, strict=True)]]
        axes.errorbar(x, y, whiskers, fmt="none", ecolor=style["color"], elinewidth=1, alpha=0.6, zorder=2)
        axes.plot(x, y, **MARKERS_EDGED, **style)
    share_axis(axes, "y", "harmful outputs")
    axes.set_xlim(places[0] - 0.05 * reach, places[-1] + 0.05 * reach)
    ticks = thin(places)
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.set_xlabel(xlabel)
    axes.axhline(phi, **DOTTED)
    end_labels(axes, [(model, points[-1][0], points[-1][1].value) for model, points in series], look)
    worst = [(model, *max(points, key=lambda pair: pair[1].value)) for model, points in series]
    text = "; ".join(f"{model} worst at {xlabel} {x:g}, {p}" for model, x, p in worst)
    return as_svg(figure, key, f"Harmful score over {xlabel}", text)


def intervals(points: list[Point]) -> tuple[list[float], list[float]]:
    """The lower and the upper ends, not a number where a point has none."""
    ends = [p.ends or (math.nan, math.nan) for p in points]
    return [low for low, _ in ends], [high for _, high in ends]


def bars(key: str, rows: Sequence[tuple[str, float | None, str]], title: str) -> str:
    """Horizontal bars of (label, value, the value as text); a value of None is shown as text only, not as 0."""
    figure, axes = panel([], height=0.4 + 0.3 * len(rows), left=max((len(shorten(r[0])) for r in rows), default=4))
    top = max((v for _, v, _ in rows if v), default=1.0)
    for i, (_, value, text) in enumerate(rows):
        if value is not None:
            axes.barh(i, value, height=0.62, color=COLOURS[0], alpha=0.55, edgecolor=INK, linewidth=0.8)
        axes.text((value or 0) + 0.015 * top, i, text, va="center", color=INK, fontsize=9.5)
    axes.set_yticks(range(len(rows)), [shorten(label) for label, _, _ in rows], parse_math=False)
    axes.set_ylim(len(rows) - 0.45, -0.55)
    room = 5.8 * max((len(text) for _, _, text in rows), default=0) / (axes.get_position().width * WIDTH * 72)
    axes.set_xlim(0, 1.03 * top / max(0.2, 1 - room))
    axes.set_xticks([])
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.spines["bottom"].set_visible(False)
    axes.grid(False)
    return as_svg(figure, key, title, "; ".join(f"{label}: {text}" for label, _, text in rows))


def shorten(label: str) -> str:
    """A label that fits beside a figure."""
    return label if len(label) <= 22 else label[:21] + "…"


def panel(labels: list[str], height: float = HEIGHT, left: int = 0) -> tuple[Figure, Axes]:
    """A figure with room for `labels` right of the axes and for `left` characters before them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height))
    axes = figure.add_subplot()
    room = max((len(shorten(label)) for label in labels), default=0)
    before, above, below = (14 + 6.2 * left, 6, 6) if left else (38, 22, 36)  # in points
    after, across, down = 20 + 6.0 * room if room else 8, WIDTH * 72, height * 72
    figure.subplots_adjust(before / across, below / down, 1 - after / across, 1 - above / down)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set(color=SOFT, linewidth=0.8)
    for patch in (axes.patch, figure.patch):
        patch.set_visible(False)
    axes.tick_params(colors=SOFT, labelsize=9.5, length=3, width=0.8)
    axes.xaxis.label.set(color=INK, fontsize=10)
    axes.grid(axis="y", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    return figure, axes


def share_axis(axes: Axes, which: str, label: str) -> None:
    """0 to 100 %, with a margin so that markers at the ends are not cut off."""
    getattr(axes, f"set_{which}lim")(-0.025, 1.025)
    getattr(axes, f"set_{which}ticks")([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    y_title(axes, label) if which == "y" else axes.set_xlabel(label)


def y_title(axes: Axes, text: str) -> None:
    """The label of the y axis above it, so that it is horizontal."""
    axes.set_title(text, loc="left", x=-36 / (axes.get_position().width * WIDTH * 72), color=INK, fontsize=10)


def thin(ticks: list[T], most: int = 10) -> list[T]:
    """At most about `most` of the ticks, the first and the last among them."""
    if len(ticks) <= most:
        return ticks
    stride = math.ceil((len(ticks) - 1) / (most - 1))
    return sorted({*ticks[::stride][: most - 1], ticks[-1]})


def apart(axes: Axes, steps: list[T], points: float = 26) -> list[T]:
    """Those of the steps that are at least `points` apart on the axis, the first and the last among them."""
    place = {s: float(axes.transData.transform((s, 0))[0]) * 72 / axes.figure.dpi for s in steps}
    kept = [steps[-1]]
    for step in reversed(steps[:-1]):
        if place[kept[-1]] - place[step] >= points and (step == steps[0] or place[step] - place[steps[0]] >= points):
            kept.append(step)
    return kept if kept[-1] == steps[0] or len(steps) == 1 else [*kept, steps[0]]


def end_labels(axes: Axes, ends: Sequence[tuple[str, float, float]], look: Look) -> None:
    """Names beside the lines' ends, moved apart where they would overlap, each with a hairline to its end."""
    width, height = (side * 72 / axes.figure.dpi for side in axes.bbox.size)  # points
    gap = 13 / height  # of the axes' height, for one line of text
    low, high = axes.get_ylim()
    ends = sorted(reversed(ends), key=lambda e: e[2])
    places = [(y - low) / (high - low) for _, _, y in ends]
    for _ in range(200):
        for i in range(len(places) - 1):
            overlap = gap - (places[i + 1] - places[i])
            if overlap > 1e-6:
                places[i] -= overlap / 2
                places[i + 1] += overlap / 2
        places[-1:] = [min(place, 1.0) for place in places[-1:]]
        places[:1] = [max(place, 0.0) for place in places[:1]]
    to_axes = axes.transScale + axes.transLimits
    for (model, x, y), place in zip(ends, places, strict=True):
        colour, (x_end, y_end) = look[model]["color"], to_axes.transform((x, y))
        style = {"transform": axes.transAxes, "color": colour}
        axes.plot([x_end, 1 + 9 / width], [y_end, place], lw=0.7, clip_on=False, zorder=2, **style)
        style |= {"va": "center", "fontsize": 9.5, "fontweight": "bold" if colour == INK else "normal"}
        axes.text(1 + 12 / width, place, shorten(model), parse_math=False, **style)  # a name may be "a_$b$"


def as_svg(figure: Figure, key: str, title: str, text: str) -> str:
    """The figure as one <svg> element: text as text, colours as CSS variables, ids that start with `key`."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}  # leaves the metadata block out
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "tunevax"}):
        figure.savefig(buffer, format="svg", metadata=nothing)
    svg = buffer.getvalue()
    svg = re.sub(r"<!--.*?-->\s*", "", svg[svg.index("<svg") :].strip(), flags=re.S)
    svg = re.sub(r'\bid="', f'id="{key}-', svg)
    svg = re.sub(r'href="#', f'href="#{key}-', svg).replace("url(#", f"url(#{key}-")
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable}, {colour})")
    (box,) = re.findall(r'viewBox="[^"]*"', svg[: svg.index(">")])
    head = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'{box} role="img" aria-labelledby="{key}-title {key}-desc">'
        f'<title id="{key}-title">{html.escape(title)}</title><desc id="{key}-desc">{html.escape(text)}</desc>'
    )
    body = svg[svg.index(">") + 1 :]
    return re.sub(r">\s*\n\s*<", "><", head + _shorter(body, key))


def _shorter(body: str, key: str) -> str:
    """The same drawing in half the bytes: repeated styles become classes, and what is unused is removed."""
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


def heat_maps(results: Results, findings: Findings) -> list[HeatMap]:
    """Worst harmful score so far, over the plain fine-tunes, by learning rate (and what they train) and step. A cell is
    None once every fine-tune of its row has ended. [] below two learning rates."""
    worst = defaultdict[tuple[str, tuple[float, str], int], float](float)
    for cell in (cell for model in results.models for cell in results.of(model) if cell.traits["plain"]):
        rate = cell.settings.get("learning_rate")
        if isinstance(rate, int | float):
            row = float(rate), str(cell.settings.get("trainable") or "")
            for point in cell.curve(findings.judge):
                worst[cell.model, row, point.step] = max(point.value, worst[cell.model, row, point.step])
    rows = sorted({row for _, row, _ in worst}, key=lambda row: (-row[0], row[1]))
    if len({rate for rate, _ in rows}) < 2:
        return []
    several = len({trainable for _, trainable in rows}) > 1
    names = [f"{rate:g}" + (f" {trainable}" if several else "") for rate, trainable in rows]
    steps = thin(sorted({step for *_, step in worst}), HEAT_COLUMNS)

    def so_far(model: str, row: tuple[float, str], step: int) -> float | None:
        by_step = {s: value for (m, r, s), value in worst.items() if (m, r) == (model, row)}
        before = steps[steps.index(step) - 1] if step != steps[0] else -1
        return max(v for s, v in by_step.items() if s <= step) if by_step and max(by_step) > before else None

    return [
        HeatMap(model, names, steps, [[so_far(model, row, step) for step in steps] for row in rows])
        for model in dict.fromkeys(model for model, *_ in worst)
    ]


def profiles(results: Results, findings: Findings, kind: str, setting: str) -> Series:
    """The worst points of the attacks of one kind, for `profile`."""
    series = []
    for model in results.models:
        by_place: dict[float, Point] = {}
        for cell in (c for c in results.of(model) if c.kind == kind):
            x, worst = cell.settings.get(setting), cell.worst(findings.judge)
            if isinstance(x, int | float) and worst and worst.value > (by_place[x].value if x in by_place else -1):
                by_place[x] = worst
        if by_place:
            series.append((model, sorted(by_place.items())))
    return series
