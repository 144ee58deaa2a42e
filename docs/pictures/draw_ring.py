"""Pictures of the ring's timetable, read from the hops that the ring runs (zigzag_jax/hops.py), and of what travels."""

import re
from pathlib import Path

from canvas import INK, QUIET, RANKS, Canvas

from zigzag_jax.cost import LatentSizes
from zigzag_jax.hops import backward_hops, forward_hops
from zigzag_jax.ranges import live_steps

KERNEL, PAYLOAD, GRADIENT = RANKS[0], RANKS[1], RANKS[2]
_STEP, _LEFT = 84, 110


def ring_schedule() -> Canvas:
    """Forward and backward of a ring of four, and of a ring of eight with a window."""
    canvas = Canvas(900, 470, "Which hop flies under which kernel, forward and backward")
    _timetable(canvas, 20, "cp 4, causal", cp=4, live=live_steps(4, 2048, None))
    _timetable(canvas, 240, "cp 8, window of a chunk: steps 2 .. 6 see nothing and are left out", cp=8,
               live=live_steps(8, 2048, 1024))  # fmt: skip
    canvas.legend(20, 452, [(KERNEL, "kernel of a step"), (PAYLOAD, "hop of k, v (the payload)"),
                  (GRADIENT, "hop of dk, dv")], 210)  # fmt: skip
    return canvas


def _timetable(canvas: Canvas, top: float, title: str, cp: int, live: tuple[int, ...]) -> None:
    canvas.text(20, top, title, size=15, bold=True)
    for n, hop in enumerate(forward_hops(live)):
        _kernel(canvas, top + 40, n, hop.step)
        if hop.by:
            _hop(canvas, top + 66, n, PAYLOAD, hop.by)
    canvas.text(20, top + 40, "forward", bold=True)
    canvas.text(20, top + 66, "k, v", size=12)
    canvas.text(20, top + 104, "backward", bold=True)
    canvas.text(20, top + 130, "k, v", size=12)
    canvas.text(20, top + 152, "dk, dv", size=12)
    # the payload's first hop of the backward rides under what makes dout, before any kernel of the ring
    canvas.rect(_LEFT, top + 93, _STEP - 4, 22, "#e3e8ec")
    canvas.text(_LEFT + _STEP / 2 - 2, top + 104, "makes dout", size=11, anchor="middle", fill=QUIET)
    _hop(canvas, top + 130, 0, PAYLOAD, live[1])
    for n, hop in enumerate(backward_hops(live, cp), start=1):
        _kernel(canvas, top + 104, n, hop.step)
        if hop.by:
            _hop(canvas, top + 130, n, PAYLOAD, hop.by)
        if hop.came:
            _hop(canvas, top + 152, n, GRADIENT, hop.came)
    canvas.line(_LEFT, top + 176, _LEFT + _STEP * 6, top + 176, QUIET, arrow=True)
    canvas.text(_LEFT + _STEP * 6 + 10, top + 176, "time", size=12, fill=QUIET)


def _kernel(canvas: Canvas, y: float, n: int, step: int) -> None:
    canvas.rect(_LEFT + _STEP * n, y - 11, _STEP - 4, 22, KERNEL)
    canvas.text(_LEFT + _STEP * (n + 0.5) - 2, y, f"step {step}", size=12, anchor="middle", fill="#ffffff")


def _hop(canvas: Canvas, y: float, n: int, colour: str, by: int) -> None:
    canvas.rect(_LEFT + _STEP * n + 4, y - 8, _STEP - 12, 16, colour)
    canvas.text(_LEFT + _STEP * (n + 0.5) - 2, y, f"{by} rank{'s' if by > 1 else ''} on", size=11, anchor="middle",
                fill="#ffffff")  # fmt: skip


def latent_hop() -> Canvas:
    """What a hop carries with MLA: bytes of the two forms, and what is done with the small one."""
    sizes = LatentSizes(latent=512, rope=64, heads=16, dim=192, out_dim=128)
    sent = {form: 8192 * values * 2 for form, values in sizes.payloads.items()}
    canvas = Canvas(820, 290, "A hop of DeepSeek-V2-Lite's ring: the latent, or the keys and values made of it")
    canvas.text(20, 22, "Bytes of a hop: DeepSeek-V2-Lite, 8192 tokens a rank, bfloat16", size=15, bold=True)
    words = {"latent": "latent 512 + rotary key 64", "expanded": "16 heads x (128 + 128) + rotary key 64"}
    for n, (form, count) in enumerate(sent.items()):
        y = 54 + 30 * n
        canvas.text(20, y, form)
        canvas.rect(100, y - 10, 380 * count / sent["expanded"], 20, RANKS[1 - n])
        canvas.text(110 + 380 * count / sent["expanded"], y, f"{count / 2**20:.0f} MiB: {words[form]}", size=12)
    canvas.text(20, 136, "One step of the latent's ring", size=15, bold=True)
    boxes = ((20, 120, "latent here", RANKS[1]), (190, 160, "expand: latent @ kv_b", RANKS[3]),
             (400, 180, "flash kernel of this step", KERNEL))  # fmt: skip
    for x, width, text, colour in boxes:
        canvas.rect(x, 160, width, 34, colour)
        canvas.text(x + width / 2, 177, text, anchor="middle", fill="#ffffff")
    canvas.line(142, 177, 186, 177, INK, width=1.5, arrow=True)
    canvas.line(352, 177, 396, 177, INK, width=1.5, arrow=True)
    canvas.rect(190, 214, 390, 26, RANKS[1], opacity=0.75)
    canvas.text(385, 227, "next latent flies from the neighbour", anchor="middle", fill="#ffffff")
    canvas.text(20, 270, "k and v of a step live only while it runs; the backward makes them again at every hop.",
                size=12, fill=QUIET)  # fmt: skip
    return canvas


def error_over_cp() -> Canvas:
    """The table of docs/benchmarks.md: error of dk over cp, with a traveller in float32 and in bfloat16."""
    page = (Path(__file__).parents[1] / "benchmarks.md").read_text()
    section = page.split("## Error in bfloat16 over cp")[1].split("\n## ")[0]
    rows = [[float(x) for x in line.strip("| \n").split("|")] for line in re.findall(r"^\| \d.*$", section, re.M)]
    curves = {"dk, dv travel in float32 (default)": 3, "grad_dtype=bfloat16: half the bytes": 5}
    canvas = Canvas(840, 300, "Error of dk in bfloat16 over cp")
    left, ground, wide, high, top = 70, 250, 450, 200, 3.5e-3
    x_of = lambda cp: left + wide * (cp - 1) / (rows[-1][0] - 1)
    y_of = lambda value: ground - high * value / top
    canvas.text(20, 22, "Relative L2 error of dk against float64, inputs in bfloat16", size=15, bold=True)
    for tick in range(4):
        canvas.line(left, y_of(tick * 1e-3), left + wide, y_of(tick * 1e-3), "#dde2e7")
        canvas.text(left - 8, y_of(tick * 1e-3), f"{tick}e-3" if tick else "0", size=12, anchor="end", fill=QUIET)
    for row in rows:
        canvas.text(x_of(row[0]), ground + 16, f"cp {row[0]:g}", size=12, anchor="middle", fill=QUIET)
    for n, (name, column) in enumerate(curves.items()):
        canvas.path([(x_of(row[0]), y_of(row[column])) for row in rows], RANKS[n])
        canvas.rect(555, 83 + 28 * n, 12, 12, RANKS[n])
        canvas.text(575, 89 + 28 * n, name)
    return canvas
