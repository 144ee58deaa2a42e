"""The bars of a benchmark, drawn from the rows that its table shows."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

BAR = 0.17  # inches of one bar
COLOURS = ("#30638e", "#edae49", "#3d8b72", "#8a5a9e", "#d1495b", "#7f8c8d", "#66a5d9", "#b58a2b", "#8fc1a9")


class Chart(NamedTuple):
    """Which columns of a table become bars."""

    values: tuple[str, ...]
    """Columns of numbers: their bars stand side by side, or one behind the other with `stacked`."""
    labels: tuple[str, ...]
    """Columns that name a group of bars."""
    series: tuple[str, ...] = ()
    """Columns whose values split a group into several bars."""
    stacked: bool = False


class Panel(NamedTuple):
    """A chart and its rows."""

    title: str
    chart: Chart
    rows: Sequence[dict]

    def groups(self) -> dict[str, dict[str, float]]:
        """The bars: {group: {series: value}}, in the order of the rows; a cell without a number makes none."""
        found: dict[str, dict[str, float]] = {}
        for row in self.rows:
            label = " ".join(
                f"{name} {row[name]}" if isinstance(row[name], int) else row[name] for name in self.chart.labels
            )
            for value in self.chart.values:
                split = [str(row[name]) for name in self.chart.series]
                series = " ".join([*split, value] if len(self.chart.values) > 1 else split) or value
                if row[value] is not None and math.isfinite(row[value]):
                    found.setdefault(label, {})[series] = row[value]
        return found

    def unit(self) -> str:
        """The words that all columns of numbers end with: "ms" of "fwd ms" and "bwd ms"."""
        ends = zip(*(name.split()[::-1] for name in self.chart.values), strict=False)
        same = [words[0] for words in itertools.takewhile(lambda words: len(set(words)) == 1, ends)]
        return " ".join(same[::-1])

    def lines(self) -> int:
        """Bars below one another, and a gap a group."""
        return sum((1 if self.chart.stacked else len(bars)) + 1 for bars in self.groups().values())

    def draw(self, axes) -> None:
        """Onto matplotlib's axes."""
        groups = self.groups()
        names = list(dict.fromkeys(name for bars in groups.values() for name in bars))
        most = max((sum(b.values()) if self.chart.stacked else max(b.values())) for b in groups.values())
        at, ticks, shown = 0.0, [], set()
        for bars in groups.values():
            first, left = at, 0.0
            for name, value in bars.items():
                label = None if name in shown else name
                shown.add(name)
                colour = COLOURS[names.index(name) % len(COLOURS)]
                axes.barh(at, value, left=left, height=0.9, color=colour, label=label)
                left = left + value if self.chart.stacked else 0.0
                if not self.chart.stacked:
                    axes.text(value + 0.005 * most, at, digits(value), va="center", fontsize=7)
                    at += 1
            if self.chart.stacked:
                axes.text(left + 0.005 * most, at, digits(left), va="center", fontsize=7)
                at += 1
            ticks.append((first + at - 1) / 2)
            at += 1
        axes.set_yticks(ticks, list(groups), fontsize=8)
        axes.tick_params(labelsize=8)
        axes.set_xlabel(self.unit(), fontsize=8)
        axes.set(xlim=(0, 1.08 * most), ylim=(at - 1, -1))
        axes.set_title(self.title, loc="left", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def digits(x: float) -> str:
    """A number beside its bar: three digits, all of them before the point."""
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"


def draw(panels: Sequence[Panel], head: str, path: Path) -> None:
    """All panels below one another, `head` above them, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [panel for panel in panels if panel.groups()]
    if not panels:
        return
    heights = [BAR * panel.lines() + 0.6 for panel in panels]
    figure, axes = pyplot.subplots(
        len(panels), squeeze=False, figsize=(10, sum(heights) + 0.5), height_ratios=heights, layout="constrained"
    )
    for panel, ax in zip(panels, axes[:, 0], strict=True):
        panel.draw(ax)
    figure.suptitle(head, fontsize=9, x=0.01, ha="left")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
