"""How a figure is drawn: once, for a page in light and dark and for a file of its own, with its data beside it.

Colours are those that colour-blind eyes tell apart (Okabe & Ito, 2008), and no two series differ by colour alone. Marks
of one series are one path, so that ten thousand trials are a few hundred kilobytes and not ten thousand elements.
"""

from __future__ import annotations

import csv
import io
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawn

BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#808080"
INK = "#24292f"  # of words and axes
INLINE = {INK: "currentColor", BLUE: "var(--blue)", ORANGE: "var(--orange)", GREEN: "var(--green)"}  # see the page
# of a mark, from its middle, in points
SHAPES = {
    "dot": "h0",
    "plus": "m-2.2 0h4.4m-2.2-2.2v4.4",
    "cross": "m-2-2l4 4m0-4l-4 4",
    "diamond": "m0-3.4l3.4 3.4l-3.4 3.4l-3.4-3.4z",
    "square": "m-3-3h6v6h-6z",
    "ring": "m-6 0a6 6 0 1 0 12 0a6 6 0 1 0-12 0z",
    "star": "m0.0 -6.0l1.4 4.1l4.3 0.1l-3.4 2.6l1.2 4.1l-3.5 -2.5l-3.5 2.5l1.2 -4.1l-3.4 -2.6l4.3 -0.1z",
    "triangle": "m0-4l4 7h-8z",
}
UNWRITABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")  # what no XML may hold
FILLED = ("diamond", "square", "star", "triangle")
# what matplotlib draws in a legend in the place of each
MARKERS = {
    "dot": "o",
    "plus": "+",
    "cross": "x",
    "diamond": "D",
    "square": "s",
    "ring": "o",
    "star": "*",
    "triangle": "^",
}


@dataclass(frozen=True)
class Figure:
    """name: of its files. title, says: what stands above and below it. heads, rows: the data that is drawn, units in
    the heads. svg: as it stands in a file."""

    name: str
    title: str
    says: str
    heads: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    svg: str

    def csv(self) -> str:
        """The data: what is no number is an empty cell."""
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow(self.heads)
        for row in self.rows:
            writer.writerow(["" if isinstance(cell, float) and math.isnan(cell) else cell for cell in row])
        return text.getvalue()

    def inline(self) -> str:
        """SVG to stand inside a page, which gives it its colours and fonts."""
        text = self.svg[self.svg.index("<svg") :].replace("background: #fff", "")
        for colour, variable in INLINE.items():
            text = text.replace(colour, variable)
        return text


def figure(width: float, height: float, rows: int, columns: int, **settings: Any) -> tuple[Drawn, list[Axes]]:
    """An empty figure in inches, and its axes row by row."""
    from matplotlib.figure import Figure as Drawn

    drawn = Drawn(figsize=(width, height), layout=settings.pop("layout", "constrained"))
    axes = list(drawn.subplots(rows, columns, squeeze=False, **settings).flat)
    for axis in axes:
        axis.tick_params(colors=INK, labelsize=8)
        axis.xaxis.label.set(color=INK, size=9)
        axis.yaxis.label.set(color=INK, size=9)
        axis.title.set_color(INK)
        axis.patch.set_alpha(0)
        for side, spine in axis.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(GREY)
            spine.set_linewidth(0.8)
    drawn.patch.set_alpha(0)
    return drawn, axes


def marks(
    axis: Axes,
    points: Sequence[tuple[float, float]],
    shape: str,
    *,
    colour: str,
    label: str,
    alpha: float = 1.0,
    size: float | None = None,
    clipped: bool = True,
) -> None:
    """One mark a point, all of them one path; shape: of SHAPES; size: in points, a dot's width, or that of its line."""
    import numpy as np

    if not points:
        return
    width = size or (3.6 if shape == "dot" else 1.2)
    x, y = np.repeat(np.asarray(points, dtype=float), 3, axis=0).T.copy()
    x[2::3] = y[2::3] = np.nan
    (line,) = axis.plot(x, y, color=colour, linewidth=width, solid_capstyle="round", alpha=alpha, clip_on=clipped)
    line.get_path().should_simplify = False
    line.set_gid(f"mark-{shape}-{len(axis.lines)}")
    filled = colour if shape in (*FILLED, "dot") else "none"
    (key,) = axis.plot([], [], MARKERS[shape], markersize=4 if shape == "dot" else 6, label=label, alpha=alpha)
    key.set(markerfacecolor=filled, markeredgecolor=colour)


def legend(axis: Axes, columns: int = 3) -> None:
    """Above the axes, where it hides nothing."""
    axis.legend(
        frameon=False, labelcolor=INK, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1.01), ncols=columns,
        borderaxespad=0, handletextpad=0.5, columnspacing=1.2,
    )  # fmt: skip


def svg(drawn: Drawn, name: str = "autoprune", title: str = "") -> str:
    """SVG text, as of a file; text stays text, and the same figure gives the same bytes."""
    from matplotlib import rc_context
    from matplotlib.text import Text

    for words in drawn.findobj(Text):
        words.set_parse_math(False)  # names are no formulas
    buffer = io.StringIO()
    with (
        rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "path.simplify": False}),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "Glyph")  # of a letter that only the reader's font has
        drawn.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Type", "Format")))
    text = UNWRITABLE.sub("?", buffer.getvalue()[buffer.getvalue().index("<svg") :])
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'(<g id="mark-(\w+)-[^>]*>\s*<path d=")([^"]*)("[^>]*style=")fill: none; ([^"]*)', _shaped, text)
    text = re.sub(
        r' id="(?:figure|axes|patch|line2d|text|legend|matplotlib\.axis|xtick|ytick|mark|\w*Coll)\w*[^"]*"', "", text
    )
    text = re.sub(r'\b(d|x|y|transform)="([^"]*)"', _rounded, text)
    text = re.sub(r"'DejaVu Sans'[^;\"]*sans-serif", "system-ui, 'DejaVu Sans', sans-serif", text)
    label = title.replace("&", "and").replace("<", "").replace('"', "")
    return text.replace("<svg", f'<svg role="img" aria-label="{label}" style="background: #fff"', 1)


def _shaped(found: re.Match[str]) -> str:
    """Each pair of ends that are one point becomes a mark there."""
    begin, shape, path, between, style = found.groups()
    points = re.findall(r"M (\S+) (\S+)", path)
    drawn = "".join(f"M{float(x):.1f} {float(y):.1f}{SHAPES[shape]}" for x, y in points)
    fill = (
        style.replace("stroke: ", "fill: ").replace("stroke-opacity", "fill-opacity")
        if shape in FILLED
        else "fill: none"
    )
    return f"{begin}{drawn}{between}{fill}; {style}"


def _rounded(found: re.Match[str]) -> str:
    """Numbers of no more than two digits after the point, which are hundredths of a point."""
    name, value = found.groups()
    short = re.sub(r"-?\d+\.\d+(?![\d.]*e)", lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), value)
    return f'{name}="{" ".join(short.split())}"'
