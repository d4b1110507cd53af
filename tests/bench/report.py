"""Writes the one table, its JSON, its Markdown and its picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from bench.measure import Row, Sheet, as_json

COLORS = {"met": "#2a8a4a", "missed": "#c0272d", "": "#8a8f98"}
HEADINGS = ("workload", "against", "ratio [min..max]", "goal", "", "ours", "theirs")


def cells(row: Row) -> tuple[str, ...]:
    ratio = row.ratio.shown("x") if row.ratio else "-"
    goal = str(row.goal) if row.goal else ""
    return (row.what, row.against, ratio, goal, row.verdict, row.ours, row.theirs or row.remark)


def as_sheet(rows: Sequence[Row]) -> Sheet:
    return Sheet("goals and ratios", HEADINGS, [cells(row) for row in rows])


def table(sheet: Sheet) -> Table:
    """Returns a sheet as a table for a terminal."""
    styles = {"met": "green", "missed": "red", "not run": "yellow"}
    found = Table(title=sheet.title, title_justify="left")
    for heading in sheet.headings:
        found.add_column(Text(heading))  # not markup: it has brackets
    for row in sheet.rows:
        found.add_row(*(Text(cell, style=styles.get(cell, "")) for cell in row))
    return found


def markdown(machine: dict[str, str], sheets: Sequence[Sheet]) -> str:
    """Returns Markdown to paste into docs/benchmarks.md."""
    parts = ["\n".join(f"- {name}: {value}" for name, value in machine.items())]
    for sheet in sheets:
        lines = [sheet.headings, ("---",) * len(sheet.headings), *sheet.rows]
        escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
        shown = "\n".join(f"| {' | '.join(line)} |" for line in escaped)
        parts.append(f"**{sheet.title}**\n\n{shown}")
    return "\n\n".join(parts) + "\n"


def write_json(path: Path, machine: dict[str, str], rows: Sequence[Row], sheets: Any) -> None:
    found = {"machine": machine, "rows": rows, "sheets": sheets}
    path.write_text(json.dumps(found, default=as_json, indent=1) + "\n")


def draw(rows: Sequence[Row], path: Path, machine: dict[str, str]) -> bool:
    """Draws bars of the ratios that have a goal, with the goal as a mark.

    Returns False if no ratio has a goal.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    panels = [
        (title, found)
        for title, at_least in (("times as fast (longer is better)", True),
                                ("ours / theirs (shorter is better)", False))
        if (found := [r for r in rows if r.ratio and r.goal and r.goal.at_least == at_least])
    ]  # fmt: skip
    if not panels:
        return False
    sizes = [len(found) for _, found in panels]
    figure = Figure(
        figsize=(10, 1.6 + 0.62 * sum(sizes) + 0.5 * len(sizes)), dpi=130,
        layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1),
    )  # fmt: skip
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, height_ratios=[n + 0.8 for n in sizes], squeeze=False)
    for (title, found), one in zip(panels, axes[:, 0], strict=True):
        draw_bars(one, found, title)
    figure.suptitle(
        f"TG-Tinker against its goals: {machine['CPU']}, {machine['cores']} cores",
        x=0.01, ha="left", fontsize=13, fontweight="bold",
    )  # fmt: skip
    figure.savefig(path)
    return True


def draw_bars(axes: Any, rows: Sequence[Row], title: str) -> None:
    for place, row in enumerate(rows):
        assert row.ratio
        assert row.goal
        middle, low, high = row.ratio.middle, row.ratio.low, row.ratio.high
        axes.barh(place, middle, height=0.55, color=COLORS[row.verdict], alpha=0.85)
        axes.plot([low, high], [place, place], color="#2b2f36", linewidth=1.4)
        goal = row.goal.bound
        axes.plot([goal, goal], [place - 0.42, place + 0.42], color="black", linewidth=2.6)
        label = f"{middle:.2f}x, goal {goal:g}x: {row.verdict}"
        axes.text(max(high, goal), place, f"  {label}", va="center", fontsize=9)
    furthest = max(max(r.ratio.high, r.goal.bound) for r in rows if r.ratio and r.goal)
    axes.set_xlim(0, 1.45 * furthest)
    axes.set_yticks(range(len(rows)), [wrapped(row.what) for row in rows], fontsize=9)
    axes.invert_yaxis()
    axes.axvline(1.0, color="#8a8f98", linewidth=0.8, linestyle=(0, (4, 4)), zorder=0)
    axes.set_xlabel(title, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def wrapped(text: str, width: int = 38) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width))
