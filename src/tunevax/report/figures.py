"""Figures as SVG strings, drawn to stay readable without colour and on a dark page.

Each is a small panel of its own, so that a narrow page can stack panels instead of shrinking text. Ink, paper
and series colours are CSS variables with a fallback; the page sets them. Models keep one colour (Okabe and
Ito's set, told apart under colour blindness), one dash and one marker in every figure; the control is ink,
thick and solid.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

from tunevax.evidence.findings import Findings
from tunevax.evidence.results import Point, Results
from tunevax.report.blocks import HeatMap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from tunevax.evidence.results import Cell, Point

INK, SOFT, GRID, PAPER = "#1d1d1b", "#6b6a66", "#dcdad4", "#fefdfb"
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]
VARIABLES = {INK: "ink", SOFT: "soft", GRID: "grid", PAPER: "paper"} | {c: f"c{i}" for i, c in enumerate(COLOURS)}
DASHES = ["--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (2, 1))]
MARKERS = ["s", "^", "D", "v", "P", "X"]
WIDTH, HEIGHT = 5.3, 3.3  # inches: one panel is 382 x 238 points
FONT = r" font-family: [^;]*;"  # the page sets it


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
    key: str, cells: list[Cell], score: str, look: dict[str, dict[str, Any]], ylabel: str, phi: float | None = None
) -> str:
    """Score against attack steps, a line per model with its interval, and a dotted line at `phi`.

    `key` makes ids unique on the page.
    """
    drawn = [(cell, cell.curve(score)) for cell in cells]
    drawn = [(cell, points) for cell, points in drawn if points]
    figure, axes = panel([cell.model for cell, _ in drawn])
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
    share_axis(axes, "y", ylabel)
    axes.set_xscale("symlog", base=2, linthresh=next((s for s in steps if s > 0), 1), linscale=0.6)
    axes.set_xlim(steps[0], max(steps[-1], 1) * 1.06)
    shown = _apart(axes, steps)
    axes.set_xticks(shown, [f"{s:,}" for s in shown])
    axes.minorticks_off()
    batch = {cell.batch for cell, _ in drawn}
    each = f" ({batch.pop()} samples each)" if len(batch) == 1 and None not in batch else ""
    axes.set_xlabel(f"attack steps{each}")
    if phi is not None:
        phi_line(axes, phi)
    _end_labels(axes, [(cell.model, points[-1].step, points[-1].value) for cell, points in drawn], look)
    told = "; ".join(f"{c.model} {p[0]} at step {p[0].step}, {p[-1]} at step {p[-1].step}" for c, p in drawn)
    return as_svg(figure, key, f"{ylabel} against attack steps, {cells[0].attack} attack", told)


def trajectory(key: str, cells: list[Cell], score: str, task: str, look: dict[str, dict[str, Any]], phi: float) -> str:
    """Harmful score against benign task accuracy, step after step: learning slowly is not resisting."""
    figure, axes = panel([cell.model for cell in cells])
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
    share_axis(axes, "y", "harmful outputs")
    share_axis(axes, "x", "benign task accuracy")
    phi_line(axes, phi)
    _end_labels(axes, ends, look)
    told = "; ".join(f"{m} ends at {x:.0%} task accuracy and {y:.0%} harmful" for m, x, y in ends)
    return as_svg(figure, key, f"Harmful score against benign task accuracy, {cells[0].attack} attack", told)


def profile(
    key: str,
    series: list[tuple[str, list[tuple[float, Point]]]],
    xlabel: str,
    look: dict[str, dict[str, Any]],
    phi: float,
) -> str:
    """Harmful score of each model, (model, [(x, point)]), over what was tried in turn: a block, or a dose."""
    figure, axes = panel([model for model, _ in series])
    places = sorted({x for _, points in series for x, _ in points})
    reach = (places[-1] - places[0]) or 1.0
    for i, (model, points) in enumerate(series):
        x = [x + 0.012 * reach * (i - (len(series) - 1) / 2) for x, _ in points]  # whiskers side by side
        y = [p.value for _, p in points]
        bars = [[p.value - p.low for _, p in points], [p.high - p.value for _, p in points]]
        style = look[model]
        axes.errorbar(x, y, bars, fmt="none", ecolor=style["color"], elinewidth=1, alpha=0.6, zorder=2)
        axes.plot(x, y, markersize=4.5, markeredgecolor=PAPER, markeredgewidth=0.6, **style)
    share_axis(axes, "y", "harmful outputs")
    axes.set_xlim(places[0] - 0.05 * reach, places[-1] + 0.05 * reach)
    shown = thin(places)
    axes.set_xticks(shown, [f"{x:g}" for x in shown])
    axes.set_xlabel(xlabel)
    phi_line(axes, phi)
    _end_labels(axes, [(model, points[-1][0], points[-1][1].value) for model, points in series], look)
    told = "; ".join(
        f"{model} worst at {xlabel} {x:g}, {p}" for model, (x, p) in ((m, max(f, key=_value)) for m, f in series)
    )
    return as_svg(figure, key, f"Harmful score over {xlabel}", told)


def _value(pair: tuple[float, Point]) -> float:
    return pair[1].value


def bars(key: str, rows: list[tuple[str, float | None, str]], title: str) -> str:
    """Horizontal bars of (label, value, the value as text); a value of None is told, not drawn as 0."""
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


# ---------------------------------------------------------------------------------------------------- drawing


def shorten(label: str) -> str:
    """A label that fits beside a figure."""
    return label if len(label) <= 22 else label[:21] + "…"


def panel(labels: list[str], height: float = HEIGHT, left: int = 0) -> tuple[Figure, Axes]:
    """A figure with room for `labels` right of the axes and for `left` characters before them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height))
    axes = figure.add_subplot()
    room = max((len(shorten(label)) for label in labels), default=0)
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


def share_axis(axes: Axes, which: str, label: str) -> None:
    """0 to 100 %, with a little air so that markers at the ends are whole."""
    ticks = [0, 0.25, 0.5, 0.75, 1]
    getattr(axes, f"set_{which}lim")(-0.025, 1.025)
    getattr(axes, f"set_{which}ticks")(ticks, [f"{100 * t:.0f} %" for t in ticks])
    if which == "y":  # above the axis, where it reads without turning one's head
        axes.set_title(label, loc="left", x=-36 / (axes.get_position().width * WIDTH * 72), color=INK, fontsize=10)
    else:
        axes.set_xlabel(label)


def phi_line(axes: Axes, phi: float) -> None:
    """The dotted line at phi."""
    axes.axhline(phi, color=SOFT, linewidth=1, linestyle=(0, (1, 2)), zorder=1)


def thin(ticks: list[Any], most: int = 10) -> list[Any]:
    """At most about `most` of the ticks, the first and the last among them."""
    if len(ticks) <= most:
        return ticks
    stride = math.ceil((len(ticks) - 1) / (most - 1))
    return sorted({*ticks[::stride][: most - 1], ticks[-1]})


def _apart(axes: Axes, steps: list[int], points: float = 26) -> list[int]:
    """Those of the steps that lie at least `points` apart on the axis, the first and the last among them."""
    place = {s: float(axes.transData.transform((s, 0))[0]) * 72 / axes.figure.dpi for s in steps}
    kept = [steps[-1]]
    for step in reversed(steps[:-1]):
        if place[kept[-1]] - place[step] >= points and (step == steps[0] or place[step] - place[steps[0]] >= points):
            kept.append(step)
    return kept if kept[-1] == steps[0] or len(steps) == 1 else [*kept, steps[0]]


def _end_labels(axes: Axes, ends: list[tuple[str, float, float]], look: dict[str, dict[str, Any]]) -> None:
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
            1 + 12 / width, place, shorten(model), transform=axes.transAxes, va="center", fontsize=9.5,
            color=style["color"], fontweight=weight, parse_math=False,  # a model may be called "a_$b$"
        )  # fmt: skip


def as_svg(figure: Figure, key: str, title: str, told: str) -> str:
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


HEAT_COLUMNS = 8


def heat_maps(results: Results, findings: Findings) -> list[HeatMap]:
    """Worst harmful score so far, over the plain fine-tunes, by learning rate (and what they train) and step.

    A cell is None once every fine-tune of its row has ended. [] below two learning rates.
    """
    from tunevax.report.figures import thin

    worst: dict[tuple[str, tuple[float, str], int], float] = {}
    for model in results.models:
        for cell in filter(lambda c: c.plain, results.of(model)):
            rate = cell.settings.get("learning_rate")
            if isinstance(rate, int | float):
                row = float(rate), str(cell.settings.get("trainable") or "")
                for point in cell.curve(findings.judge):
                    worst[model, row, point.step] = max(point.value, worst.get((model, row, point.step), 0.0))
    rows = sorted({row for _, row, _ in worst}, key=lambda row: (-row[0], row[1]))
    if len({rate for rate, _ in rows}) < 2:
        return []
    several = len({trainable for _, trainable in rows}) > 1
    names = [f"{rate:g}" + (f" {trainable}" if several else "") for rate, trainable in rows]
    steps = thin(sorted({step for *_, step in worst}), HEAT_COLUMNS)

    def so_far(model: str, row: tuple[float, str], step: int) -> float | None:
        found = {s: value for (m, r, s), value in worst.items() if (m, r) == (model, row)}
        before = steps[steps.index(step) - 1] if step != steps[0] else -1
        return max(v for s, v in found.items() if s <= step) if found and max(found) > before else None

    return [
        HeatMap(model, names, steps, [[so_far(model, row, step) for step in steps] for row in rows])
        for model in dict.fromkeys(model for model, *_ in worst)
    ]


def profiles(
    results: Results, findings: Findings, kind: str, setting: str
) -> list[tuple[str, list[tuple[float, Point]]]]:
    """(model, [(block or dose, its worst point)]) of the attacks of one kind, for a figure."""
    series = []
    for model in results.models:
        found: dict[float, Point] = {}
        for cell in (c for c in results.of(model) if c.kind == kind):
            x, worst = cell.settings.get(setting), cell.worst(findings.judge)
            if isinstance(x, int | float) and worst and (x not in found or worst.value > found[x].value):
                found[x] = worst
        if found:
            series.append((model, sorted(found.items())))
    return series
