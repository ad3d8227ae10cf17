"""A result as a picture: an SVG for README.md and for slides.

Above, the round trip of each pool on a logarithmic scale, a dot at the median and a bar from the 10th to the 90th
percentile; below, the grid over four connections: throughput, waits and fairness as processes grow, a column for each
hold. What was not measured is not drawn.

Texts stay texts. Colours are those of a light page; a rule in the file changes those of the background, the texts and
the lines where the reader prefers a dark one. The file bears the digest of its result as its identifier.

Needs matplotlib (`pip install 'shmpool[bench]'`); importing this module without it is an ImportError that says so.

Not here: tables in words (`report`).
"""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

try:
    import matplotlib as mpl
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator
except ModuleNotFoundError as missing:
    raise ImportError("a picture needs matplotlib: pip install 'shmpool[bench]'") from missing

from benches.permits import Pooled, Unguarded
from benches.results import Result, candidates, cells

WIDTH_IN = 9.0
CONNECTIONS = 4  # of the cells that are drawn
PAPER, INK, FAINT, RULE = "#ffffff", "#1f2328", "#59636e", "#d1d9e0"
DARK = {PAPER: "#0d1117", INK: "#f0f6fc", FAINT: "#9198a1", RULE: "#3d444d"}
GROUPS = {
    "shmpool": "#2f81f7",
    "for one process": "#d29922",
    "for several processes": "#bf4b8a",
    "floor": "#8b949e",
}
CONTENDERS = ("#2f81f7", "#e5534b", "#d29922", "#3fa35b", "#bf4b8a", "#9a6ee0", "#7d8590")
# Of the table, variants that lie within a spread of one that is drawn.
UNDRAWN = ("stats=False", "try_get", "get_tcp", "c: pass", "C call", "C guard with", "guard, with get", "defaults")
STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Helvetica", "Arial"],
    "font.size": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "shmpool",
    "text.color": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 9,
    "axes.labelcolor": FAINT,
    "axes.edgecolor": RULE,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": FAINT,
    "ytick.labelcolor": FAINT,
    "figure.facecolor": PAPER,
    "legend.frameon": False,
}
MEASURES = (
    ("of_maximum", "throughput /\nthe maximum", 1.0),
    ("p99", "wait, p99", 1e-6),
    ("p999", "wait, p99.9", 1e-6),
    ("fairness", "slowest /\nfastest worker", 1.0),
)


def digest(result: Result) -> str:
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()


def draw(result: Result, path: Path) -> bool:
    """Writes the picture; says whether there was anything to draw."""
    table = candidates(result)
    rows = [row for row in table["rows"] if not any(word in row["name"] for word in UNDRAWN)] if table else []
    drawn = [cell for cell in cells(result) if cell["connections"] == CONNECTIONS]
    if not rows and not drawn:
        return False
    heights = [0.6 + 0.2 * len(rows) if rows else 0.0, 6.6 if drawn else 0.0]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_IN, sum(heights)), layout="constrained")
        parts: Any = figure.subfigures(2, height_ratios=heights) if all(heights) else [figure, figure]
        if rows:
            _draw_candidates(parts[0], rows)
        if drawn:
            _draw_grid(parts[1], drawn)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Identifier": digest(result)})
    path.write_text(_for_dark_pages(text.getvalue()), encoding="utf-8")
    return True


def _for_dark_pages(svg: str) -> str:
    rules = "".join(
        f'[style*="{what}: {light}"]{{{what}:{dark}!important}}'
        for light, dark in DARK.items()
        for what in ("fill", "stroke")
    )
    return svg.replace("<defs>", f"<style>@media(prefers-color-scheme:dark){{{rules}}}</style>\n <defs>", 1)


def _entitle(part: Any, title: str, how: str) -> None:
    part.suptitle(f"{title} ({how})", x=0.01, ha="left", fontweight="bold", fontsize=10)


def _draw_candidates(part: Any, rows: list[dict[str, Any]]) -> None:
    axes: Axes = part.subplots()
    _entitle(part, "One lease and its return, one thread", "median, 10th to 90th percentile")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda ns, _: time_text(ns / 1e9)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(axis="y", visible=False)
    axes.tick_params(length=0)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    for at, row in enumerate(rows):
        ns, colour = row["ns"], GROUPS[row["group"]]
        axes.plot([ns["p10"], ns["p90"]], [at, at], color=colour, linewidth=4, alpha=0.35, solid_capstyle="round")
        axes.plot([ns["median"]], [at], "o", color=colour, markersize=6)
        axes.annotate(
            time_text(ns["median"] / 1e9), (ns["p90"], at), (7, 0), textcoords="offset points", va="center", fontsize=8
        )
    for label, row in zip(axes.get_yticklabels(), rows, strict=True):
        ours = row["group"] == "shmpool"
        label.set(color=INK if ours else FAINT, fontweight="bold" if ours else "normal")
    for group, colour in GROUPS.items():
        axes.plot([], [], "o", color=colour, label=group)
    axes.legend(loc="upper right", labelcolor=INK)
    axes.margins(x=0.09)


def _draw_grid(part: Any, drawn: list[dict[str, Any]]) -> None:
    holds, processes = (sorted({cell[what] for cell in drawn}) for what in ("hold_us", "processes"))
    _entitle(part, f"Many processes over {CONNECTIONS} connections", "medians; of shmpool all turns lie in the shade")
    tops = {
        measure: max(1.05, *(one[measure]["median"] for cell in drawn for one in cell["contenders"])) * 1.06
        for measure, *_ in MEASURES
    }
    grid = part.subplots(len(MEASURES), len(holds), sharex=True, sharey="row", squeeze=False)
    for column, hold in enumerate(holds):
        of_hold = sorted((cell for cell in drawn if cell["hold_us"] == hold), key=lambda cell: int(cell["processes"]))
        grid[0][column].set_title(f"held {time_text(hold / 1e6)}" if hold else "given back at once")
        for axes, (measure, label, unit) in zip(grid[:, column], MEASURES, strict=True):
            _draw_measure(axes, of_hold, measure, unit, tops[measure])
            if column == 0:
                axes.set_ylabel(label)
        grid[-1][column].set_xlabel("processes")
    grid[0][0].set_xscale("log", base=2)
    grid[0][0].set_xticks(processes, list(map(str, processes)))
    handles = {text: line for axes in grid.flat for line, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    part.legend(handles.values(), handles, loc="outside lower center", ncols=4, labelcolor=INK)


def _draw_measure(axes: Axes, of_hold: list[dict[str, Any]], measure: str, unit: float, top: float) -> None:
    axes.tick_params(which="both", length=0)
    if unit == 1.0:
        axes.set_ylim(0.0, top)
    else:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda seconds, _: time_text(seconds)))
        axes.yaxis.set_minor_locator(NullLocator())
    names = list(dict.fromkeys(one["name"] for cell in of_hold for one in cell["contenders"]))
    for name, colour in zip((name for name in names if name != Unguarded.name), CONTENDERS, strict=False):
        points = [
            (cell["processes"], one[measure]) for cell in of_hold for one in cell["contenders"] if one["name"] == name
        ]
        at, spreads = [x for x, _ in points], [spread for _, spread in points]
        bold = name == Pooled.name
        axes.plot(at, [spread["median"] * unit for spread in spreads], "o-", color=colour, label=name,
                  linewidth=2.4 if bold else 1.2, markersize=5 if bold else 3.5, zorder=3 if bold else 2)  # fmt: skip
        if bold:
            least, most = ([spread[end] * unit for spread in spreads] for end in ("p10", "p90"))
            axes.fill_between(at, least, most, color=colour, alpha=0.15, linewidth=0)


def time_text(seconds: float) -> str:
    """4.9 ns, 159 ns, 1.4 µs, 21 ms."""
    for unit, scale in (("ns", 1e9), ("µs", 1e6), ("ms", 1e3)):
        if (value := seconds * scale) < 999.5:
            return f"{value:.{1 if value < 9.95 and value % 1 else 0}f} {unit}"
    return f"{seconds:.1f} s"
