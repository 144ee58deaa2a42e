"""A picture as SVG text: rectangles, lines, arrows, words. Written out here so that equal data give equal bytes, which
a test compares.
"""

from html import escape
from pathlib import Path
from typing import Literal

INK, QUIET, PAPER = "#1f2933", "#7b8794", "#ffffff"
RANKS = ("#30638e", "#d1495b", "#e0a02c", "#00796b", "#8d6a9f", "#5b8c3a", "#a0622d", "#4f6d7a")
"""A colour for each rank or step."""

Anchor = Literal["start", "middle", "end"]


def _n(x: float) -> str:
    return f"{round(float(x), 2):g}"


class Canvas:
    """Draws on white paper, so that pages in dark mode can show it; the origin is the top left corner, units pixels."""

    def __init__(self, width: float, height: float, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self._parts: list[str] = []

    def rect(
        self, x: float, y: float, width: float, height: float, fill: str, *, stroke: str | None = PAPER,
        opacity: float = 1.0,
    ) -> None:  # fmt: skip
        """A rectangle; stroke None: no border."""
        border = "" if stroke is None else f' stroke="{stroke}"'
        faint = "" if opacity == 1.0 else f' fill-opacity="{_n(opacity)}"'
        self._parts.append(
            f'<rect x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}" fill="{fill}"{border}{faint}/>'
        )

    def text(
        self, x: float, y: float, words: str, *, size: int = 13, fill: str = INK, anchor: Anchor = "start",
        bold: bool = False,
    ) -> None:  # fmt: skip
        """Words whose middle height is y."""
        weight = ' font-weight="600"' if bold else ""
        self._parts.append(
            f'<text x="{_n(x)}" y="{_n(y + 0.35 * size)}" font-size="{size}" fill="{fill}" text-anchor="{anchor}"'
            f"{weight}>{escape(words)}</text>"
        )

    def line(
        self, x0: float, y0: float, x1: float, y1: float, colour: str = INK, *, width: float = 1, dash: str = "",
        arrow: bool = False,
    ) -> None:  # fmt: skip
        """A line, with a head at its end where it is an arrow."""
        extra = (f' stroke-dasharray="{dash}"' if dash else "") + (' marker-end="url(#head)"' if arrow else "")
        self._parts.append(
            f'<line x1="{_n(x0)}" y1="{_n(y0)}" x2="{_n(x1)}" y2="{_n(y1)}" stroke="{colour}" '
            f'stroke-width="{_n(width)}"{extra}/>'
        )

    def path(self, points: list[tuple[float, float]], colour: str, *, width: float = 2) -> None:
        """Straight lines from point to point, a dot at each."""
        joined = " ".join(f"{_n(x)},{_n(y)}" for x, y in points)
        self._parts.append(f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="{_n(width)}"/>')
        self._parts += [f'<circle cx="{_n(x)}" cy="{_n(y)}" r="3.5" fill="{colour}"/>' for x, y in points]

    def legend(self, x: float, y: float, entries: list[tuple[str, str]], step: float) -> None:
        """(colour, words) side by side, `step` pixels apart."""
        for n, (colour, words) in enumerate(entries):
            self.rect(x + n * step, y - 6, 12, 12, colour)
            self.text(x + n * step + 18, y, words, size=12)

    def svg(self) -> str:
        """The file's text."""
        head = (
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            f'orient="auto-start-reverse"><path d="M0 0 L8 4 L0 8 z" fill="{INK}"/></marker></defs>'
        )
        size = f'viewBox="0 0 {_n(self.width)} {_n(self.height)}" width="{_n(self.width)}" height="{_n(self.height)}"'
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="system-ui, Helvetica, Arial, sans-serif" '
            'role="img">',
            f"<title>{escape(self.title)}</title>",
            head,
            f'<rect width="100%" height="100%" rx="6" fill="{PAPER}"/>',
            *self._parts,
            "</svg>",
        ]
        return "\n".join(lines) + "\n"

    def write(self, file: Path) -> None:
        """Write the file."""
        file.write_text(self.svg())
