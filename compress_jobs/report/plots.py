"""The figures of a report: each function draws one and returns it as inline SVG.

Text stays text (searchable, small, in the page's font). Nothing in a figure is told by colour alone: modes and
methods differ in shape, stacked parts in hatching, and a heat map marks its largest cell. The same arguments give
the same bytes: ids are hashed with a fixed salt and no date is written.
"""

from __future__ import annotations

import html
import io
import math
import re
import warnings
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from compress_jobs.report.page import clean, error_text, size_text

# Okabe and Ito's colours that stand out on white, each with a shape of its own.
_BLUE, _VERMILION, _GREEN, _PURPLE, _INK, _GREY = "#0072B2", "#D55E00", "#009E73", "#8F4D75", "#1b1f24", "#6b7177"
_MODES = {"core": ("on a basis", "o", _BLUE), "truncated": ("truncated", "s", _VERMILION), "raw": ("raw", "D", _GREEN)}
_METHODS = {"jd-full": ("o", _BLUE, "-"), "jd-diag": ("^", _VERMILION, "-."), "svd": ("s", _INK, "--")}
_PARTS = {
    "bases": (_BLUE, ""),
    "cores": (_VERMILION, "////"),
    "truncated": (_GREEN, "\\\\\\\\"),
    "raw": (_PURPLE, "xxxx"),
}
MAX_NAMED = 40  # adapters that get a line of their own; beyond, a step curve
_WIDTH = 5.8  # inches of 72 units; the page shows a unit as 0.9 to 1.7 pixels

_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "compress-then-serve",
    "text.parse_math": False,  # an id with dollar signs is an id
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#e3e5e8",
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "hatch.color": "white",
    "hatch.linewidth": 0.8,
}


def error_by_adapter(
    errors: Mapping[str, tuple[str, float]], gate: float, means: Mapping[str, float], label: str
) -> str:
    """``errors``: id -> (mode, error); ``means``: what a line is -> where it stands."""
    ranked = sorted(errors.items(), key=lambda item: (-item[1][1], item[0]))
    is_named = len(ranked) <= MAX_NAMED
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(1.0 + 0.19 * len(ranked) if is_named else 3.4)
        if is_named:
            _dots(axes, ranked)
        else:
            _steps(axes, ranked)
        draw_line = axes.axvline if is_named else axes.axhline
        largest = max(error for _, (_, error) in ranked) or gate
        limit = largest * 1.12
        if gate <= 4 * largest:
            draw_line(gate, color=_INK, linewidth=1.4, label=f"gate {gate:g}")
            limit = max(limit, gate * 1.08)
        elif is_named:
            _in_corner(axes, f"gate {gate:g}: beyond this axis →", (1, 0), (-2, 3), "bottom")
        else:
            _in_corner(axes, f"gate {gate:g}: beyond this axis ↑", (1, 1), (-2, -2), "top")
        for style, (name, mean) in zip(("--", ":"), means.items(), strict=False):
            draw_line(mean, color=_GREY, linewidth=1.4, linestyle=style, label=f"{name} {error_text(mean)}")
            limit = max(limit, mean * 1.08)
        if is_named:
            axes.set_xlim(-0.015 * limit, limit)
        else:
            axes.set_ylim(-0.015 * limit, limit)
        figure.legend(loc="outside lower center", ncols=2)
        return _svg(figure, "error-by-adapter", label)


def _dots(axes: Axes, ranked: Sequence[tuple[str, tuple[str, float]]]) -> None:
    axes.set_yticks(range(len(ranked)), [short(adapter_id) for adapter_id, _ in ranked])
    axes.set_ylim(len(ranked) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(True, axis="both")
    axes.set_xlabel("squared relative error")
    _by_mode(axes, [(error, row, mode) for row, (_, (mode, error)) in enumerate(ranked)])


def _steps(axes: Axes, ranked: Sequence[tuple[str, tuple[str, float]]]) -> None:
    modes = [mode for _, (mode, _) in ranked]
    usual = max(_MODES, key=modes.count)
    errors = [error for _, (_, error) in ranked]
    label = f"all adapters (unmarked: {_MODES[usual][0]})"
    axes.stairs(errors, np.arange(len(errors) + 1), baseline=None, color=_BLUE, linewidth=1.6, label=label)
    axes.set_xlim(0, len(errors))
    axes.grid(True, axis="y")
    axes.set_xlabel("adapters, from the largest error to the smallest")
    axes.set_ylabel("squared relative error")
    _by_mode(axes, [(row + 0.5, error, mode) for row, (_, (mode, error)) in enumerate(ranked) if mode != usual])


def _in_corner(axes: Axes, text: str, corner: tuple[int, int], offset: tuple[int, int], side: str) -> None:
    axes.annotate(
        text, corner, offset, xycoords="axes fraction", textcoords="offset points", ha="right", va=side
    )  # fmt: skip


def _by_mode(axes: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    for mode, (name, marker, color) in _MODES.items():
        own = [(x, y) for x, y, its_mode in points if its_mode == mode]
        if own:
            axes.plot(*zip(*own, strict=True), marker, color=color, markersize=5, label=name, clip_on=False, zorder=3)


def heat_map(
    name: str,
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    axis_labels: tuple[str, str],
    legend: str,
    label: str,
) -> str:
    """``values`` (rows, columns), NaN where there is nothing to show; darker is more; see ``has_ring``."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(0.9 + min(0.34 * len(rows), 3.6))
        colors = matplotlib.colormaps["cividis_r"].with_extremes(bad="#f0f1f3")
        image = axes.imshow(np.ma.masked_invalid(values), cmap=colors, aspect="auto", interpolation="nearest")
        _thin_ticks(axes.xaxis, columns)
        _thin_ticks(axes.yaxis, rows)
        axes.set_xlabel(axis_labels[0])
        axes.set_ylabel(axis_labels[1])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        row, column = np.unravel_index(np.nanargmax(values), values.shape)
        if not has_ring(values):
            middle = (np.nanmin(values) + np.nanmax(values)) / 2
            for (y, x), value in np.ndenumerate(values):
                if not np.isnan(value):
                    color = "white" if value > middle else _INK
                    axes.text(x, y, f"{value:.2f}", ha="center", va="center", color=color, fontsize=8)
        else:
            axes.plot(
                column, row, "o", markerfacecolor="none", markeredgecolor="white", markersize=6, markeredgewidth=1.6
            )
        bar = figure.colorbar(image, ax=axes, pad=0.02, fraction=0.04, aspect=30)
        bar.set_label(legend)
        bar.outline.set_visible(False)
        bar.locator = MaxNLocator(4)
        return _svg(figure, name, label)


def has_ring(values: np.ndarray) -> bool:
    """Whether the cells of a heat map are too many for numbers, so that a ring marks the largest."""
    return bool(max(values.shape) > 12)


def bars(name: str, values: Mapping[str, float], axis_labels: tuple[str, str], label: str) -> str:
    """A bar for each of ``values``: lying where they are few, standing where they are many."""
    texts = [f"{value:,}" if isinstance(value, int) else f"{value:,.1f}" for value in values.values()]
    places, lengths = range(len(values)), list(values.values())
    with matplotlib.rc_context(_STYLE):
        if len(values) <= 12:
            figure, axes = _figure(0.75 + 0.26 * len(values))
            axes.bar_label(axes.barh(places, lengths, color=_BLUE, height=0.62), texts, padding=4)
            axes.set_yticks(places, [short(key) for key in values])
            axes.set_ylim(len(values) - 0.5, -0.5)
            along: Axis = axes.xaxis
        else:
            figure, axes = _figure(2.4)
            drawn = axes.bar(places, lengths, color=_BLUE, width=0.7)
            if len(values) <= 30:
                axes.bar_label(drawn, texts, padding=2, fontsize=8)
            _thin_ticks(axes.xaxis, list(values))
            axes.set_xlim(-0.7, len(values) - 0.3)
            along = axes.yaxis
        axes.margins(0.14)
        across = axes.yaxis if along is axes.xaxis else axes.xaxis
        across.set_label_text(axis_labels[0])
        across.set_tick_params(length=0)
        along.set_label_text(axis_labels[1])
        along.set_major_locator(MaxNLocator(5, integer=all(isinstance(value, int) for value in lengths)))
        along.grid(True)
        return _svg(figure, name, label)


def trade_off(
    weighed: Mapping[str, Sequence[tuple[int, float]]],
    marked: Mapping[str, tuple[int, float]],
    target: float | None,
    label: str,
) -> str:
    """``weighed``: method -> (bytes, error) of each option; ``marked``: what a point is -> the point. Logarithmic:
    errors must be above 0. A line joins the options of a method that nothing of that method beats."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(3.9)
        for method, points in weighed.items():
            marker, color, line = _METHODS.get(method, ("v", _PURPLE, ":"))
            axes.plot(*zip(*points, strict=True), marker, color=color, markersize=5, alpha=0.45, markeredgewidth=0)
            axes.plot(
                *zip(*frontier(points), strict=True), marker=marker, color=color, linestyle=line,
                markersize=5, linewidth=1.4, label=short(method),
            )  # fmt: skip
        styles = (("*", 15), ("P", 9))
        for (marker, size), (name, (num_bytes, error)) in zip(styles, marked.items(), strict=False):
            axes.plot(
                [num_bytes], [error], marker, markersize=size, color="white" if marker == "*" else _INK,
                markeredgecolor=_INK, markeredgewidth=1.3, label=name, zorder=4, linestyle="none",
            )  # fmt: skip
        if target is not None:
            axes.axhline(target, color=_GREY, linewidth=1.2, linestyle=(0, (1, 2)), label=f"target {target:g}")
        for axis, text in ((axes.xaxis, size_text), (axes.yaxis, lambda value: f"{value:.3g}")):
            axis.axes.set_xscale("log") if axis is axes.xaxis else axis.axes.set_yscale("log")
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(FuncFormatter(lambda value, _, text=text: text(value)))
            axis.set_minor_locator(NullLocator())
            axis.set_minor_formatter(NullFormatter())
        axes.grid(True)
        axes.set_xlabel("bytes resident (logarithmic)")
        axes.set_ylabel("mean squared relative error (logarithmic)")
        figure.legend(loc="outside lower center", ncols=2)
        return _svg(figure, "trade-off", label)


def kept_by_gate(
    levels: Sequence[tuple[float, float, float]],
    ways: Sequence[tuple[float, float]],
    gate: float,
    keep: float,
    label: str,
) -> str:
    """``levels``: (gate, kept in the mean, of the worst), ascending; ``ways``: (error, kept) of single adapters. What
    is beyond all is drawn as all."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(3.4)
        gates, mean, worst = zip(*levels, strict=True)
        axes.plot(gates, mean, "o-", color=_BLUE, linewidth=1.6, markersize=4, label="mean")
        axes.plot(gates, worst, "s--", color=_VERMILION, linewidth=1.2, markersize=4, label="worst")
        if ways:
            errors, kept = zip(*((error, min(kept, 1.0)) for error, kept in ways), strict=True)
            axes.plot(errors, kept, "x", color=_GREY, markersize=5, label="one adapter, at its error")
        axes.axvline(gate, color=_INK, linewidth=1.4, label=f"gate {gate:g}")
        axes.axhline(keep, color=_GREY, linewidth=1.2, linestyle=(0, (1, 2)), label=f"asked for {keep:g}")
        axes.set_xlim(0, max(gates) * 1.03)
        axes.set_ylim(bottom=max(axes.get_ylim()[0], -0.1))  # one that does worse than the base by far is cut off
        axes.grid(True)
        axes.set_xlabel("gate, or squared relative error")
        axes.set_ylabel("share kept")
        figure.legend(loc="outside lower center", ncols=3)
        return _svg(figure, "kept-by-gate", label)


def frontier(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Those that no other point beats in both bytes and error, by ascending bytes."""
    best, kept = math.inf, []
    for num_bytes, error in sorted(points):
        if error < best:
            best = error
            kept.append((num_bytes, error))
    return kept


def bytes_before_and_after(before: int | None, parts: Mapping[str, int], label: str) -> str:
    """``parts``: bases, cores, truncated, raw -> bytes."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(1.9 if before else 1.4)
        names = ["after"]
        total, left = sum(parts.values()), 0
        for part, num_bytes in parts.items():
            color, hatch = _PARTS[part]
            if num_bytes:
                axes.barh(0, num_bytes, left=left, color=color, hatch=hatch, edgecolor="white", label=part, height=0.6)
                left += num_bytes
        axes.annotate(size_text(total), (total, 0), (4, 0), textcoords="offset points", va="center")
        if before:
            names.append("before")
            axes.barh(1, before, color="#9aa0a6", height=0.6)
            axes.annotate(size_text(before), (before, 1), (4, 0), textcoords="offset points", va="center")
        axes.set_yticks(range(len(names)), names)
        axes.tick_params(axis="y", length=0)
        axes.set_xlim(0, max(before or 0, total) * 1.16)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: size_text(value)))
        axes.spines["left"].set_visible(False)
        figure.legend(loc="outside lower center", ncols=4)
        return _svg(figure, "bytes", label)


def short(name: str, most: int = 26) -> str:
    """Both ends of a long name, which is where names differ."""
    name = clean(name)
    return name if len(name) <= most else f"{name[: most - 9]}…{name[-8:]}"


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _thin_ticks(axis: Axis, names: Sequence[str]) -> None:
    step = math.ceil(len(names) / 20)
    axis.set_ticks(range(0, len(names), step), [short(name) for name in names[::step]])


def _svg(figure: Figure, name: str, label: str) -> str:
    """Inline SVG: no prolog, no metadata, no namespaces (HTML needs none), ids that are this figure's own."""
    out = io.StringIO()
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with warnings.catch_warnings():
        # Widths are guessed for what the layout's font lacks; the browser sets the text in a font that has it.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(out, format="svg", metadata=metadata, dpi=288)
    svg = out.getvalue()
    svg = svg[svg.index("<svg ") :]
    # Tags only: a text that looks like an attribute is left alone.
    svg = re.sub(r"<[^>]*>", lambda tag: _own_ids(tag[0], name), svg)
    svg = re.sub(r"\s*<defs>\s*<style.*?</style>\s*</defs>", "", svg, count=1, flags=re.DOTALL)
    attributes = f'class="chart" role="img" aria-label="{html.escape(clean(label))}"'
    return re.sub(r'<svg .*?(viewBox="[^"]*")[^>]*>', lambda head: f"<svg {head[1]} {attributes}>", svg, count=1)


def _own_ids(tag: str, name: str) -> str:
    if tag.startswith("<g "):
        tag = re.sub(r' id="[^"]*"', "", tag)
    return re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", tag)
