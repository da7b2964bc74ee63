"""Draws the steady loop of a kernel of the MoE layer as an SVG: what one wave issues, and what it
keeps busy.

    python tools/draw_loop.py --kernel dispatch --activations mxfp8 --out loop.svg

The emulator executed these instructions in this order. Their places in time are a model: the wave
issues in order, one in 4 cycles; a matrix instruction waits for the matrix pipe and keeps it for
its cycles (`gfx950.counters`); LDS serves the same instruction of all waves of the workgroup in
turn, and `lgkmcnt` waits for it. Nothing else costs time."""

import argparse
import sys
from html import escape
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench_moe import packed_experts

import gfx950
import moe_gluon
from gfx950.counters import classify

# cycles; pixels; lines of labels under the last row
ISSUE, WIDTH, LEFT, TOP, ROW, LABELS = (4, 1200, 120, 86, 26, 3)
ROWS = (  # label, colour on light, on dark, classes of instructions
    ("matrix", "c2410c", "fb8b4b", "matrix"),
    ("LDS", "1d6fb8", "5cacee", "lds"),
    ("copy to LDS", "0f8a6d", "3ecfa8", "copy to lds"),
    ("vector ALU", "7c5cbf", "b49bf0", "vector"),
    ("global memory", "9a7b0a", "d9b84a", "vector load", "vector store", "atomic", "scratch"),
    ("scalar", "8b95a1", "7d8794", "scalar", "scalar load", "branch", "nop", "cache"),
    ("wait, barrier", "c01f45", "fb6f8a", "wait", "barrier"),
)
PALETTE = [(f"c{i}", *row[1:3]) for i, row in enumerate(ROWS)] + [
    ("paper", "ffffff", "0d1117"),
    ("ink", "1f2933", "d7dde4"),
    ("grid", "e3e7eb", "262d36"),
]
LIGHT, DARK = ("".join(f".{colour[0]}{{fill:#{colour[i]}}}" for colour in PALETTE) for i in (1, 2))
STYLE = (
    "text{font:12px "
    "sans-serif}.small{font-size:10px}.bold{font-weight:600}.title{font-size:15px;font-weight:600}"
    f"{LIGHT}@media(prefers-color-scheme:dark){{{DARK}}}"
)


def problem(tokens, hidden, inner, experts, activations):
    """Arguments of `moe_gluon.moe`: random, each token to one expert."""

    x, router = torch.randn(tokens, hidden), torch.randn(experts, hidden)
    packed = packed_experts(activations, experts, hidden, inner)
    return x.bfloat16(), router.bfloat16(), torch.zeros(experts), packed, 1, activations


def schedule(launch, waves):
    """The traced wave by the model: [(instruction, its row, first cycle, last + 1)] in order of
    issue."""
    counters, events, clock, matrix, lds, served = launch.counters, [], 0, 0, 0, []
    for ins in (launch.program.code[pc] for pc in launch.trace):
        kind, start, end = classify(ins), clock, clock + ISSUE
        if kind == "matrix":
            start = clock = max(clock, matrix)
            end = matrix = start + ins.cycles
        elif kind == "lds":
            start = max(clock, lds)
            end = lds = start + waves * counters.lds_cycles[ins.pc] / counters.counts[ins.pc]
        elif kind == "wait" and (done := len(served) - ins.mods.get("lgkmcnt", len(served))) > 0:
            clock = max(clock, *served[:done])
            end, served = clock + ISSUE, served[done:]
        served += [end] * (kind in ("lds", "scalar load"))
        clock += ISSUE
        events.append((ins, next(i for i, row in enumerate(ROWS) if kind in row[3:]), start, end))
    return events


def draw(launch, what):
    """The SVG of the loop's second iteration, and the third if short. Exits where the traced wave
    has no such."""
    c, loop, waves = (
        launch.counters,
        launch.counters.loop(),
        launch.waves // int(np.prod(launch.grid)),
    )
    heads, turns = (
        np.flatnonzero(np.equal(launch.trace, loop["first"])),
        1 + (loop["last"] - loop["first"] < 150),
    )
    if len(heads) < turns + 2:
        raise SystemExit(
            f"wave 0 enters {launch.name}'s loop {len(heads)} times, {turns + 2} needed: try "
            "--workgroup"
        )
    first, last, events = heads[1], heads[1 + turns], schedule(launch, waves)
    drawn, t0, t1 = [e[0] for e in events[first:last]], events[first][2], events[last][2]
    events = [
        (ins, row, max(start, t0), min(end, t1))
        for ins, row, start, end in events
        if start < t1 and end > t0
    ]
    rows = sorted({row for _, row, *_ in events})
    scale, bottom, free, shapes = (
        (WIDTH - LEFT - 14) / (t1 - t0),
        TOP + ROW * len(rows),
        [0] * LABELS,
        [],
    )

    def text(x, y, content, style="ink", anchor="start"):
        shapes.append(
            f'<text class="{style}" x="{x:.1f}" y="{y}" '
            f'text-anchor="{anchor}">{escape(content)}</text>'
        )

    def box(style, x, y, width, height, tip):
        shapes.append(
            f'<rect class="{style}" x="{x:.1f}" y="{y}" width="{max(1, width):.1f}" '
            f'height="{height}">'
            f"<title>{escape(tip)}</title></rect>"
        )

    for cycle in range(
        0, int(t1 - t0) + 1, next(s for s in (50, 100, 200, 500, 1000, 9**9) if (t1 - t0) / s < 20)
    ):
        box("grid", LEFT + scale * cycle, TOP - 8, 1, bottom - TOP + 8, f"cycle {cycle}")
        text(LEFT + scale * cycle, TOP - 12, f"{cycle:,}", "ink small", "middle")
    for i, row in enumerate(rows):
        text(LEFT - 10, TOP + ROW * i + 13, ROWS[row][0], f"c{row} bold", "end")
    for ins, row, start, end in events:
        x, y, width, height = (
            LEFT + scale * (start - t0),
            TOP + ROW * rows.index(row),
            scale * (end - start),
            ROW - 8,
        )
        if ins.op == "s_barrier":
            y, width, height = TOP - 8, 0, bottom - TOP + 8
        box(
            f"c{row}",
            x,
            y,
            width - 0.6,
            height,
            f"{ins.text}  {ins.where.split()[0].rpartition('/')[2]}",
        )
        label, line = (
            ins.text.removeprefix("s_waitcnt "),
            next((i for i in range(LABELS) if free[i] <= x), None),
        )
        if ins.op == "s_waitcnt" and line is not None:  # where waits crowd, some go without
            free[line] = x + 6 * len(label) + 4
            text(x, bottom + 6 + 11 * line, label, f"c{row} small")
    matrix, lds = (
        sum(i.cycles for i in drawn if i.klass == "matrix"),
        {
            kind: waves
            / turns
            * sum(c.lds_cycles[i.pc] / c.counts[i.pc] for i in drawn if i.klass == kind)
            for kind in ("lds", "copy to lds")
        },
    )
    text(14, 24, f"{launch.name}: one wave of {waves} in the steady loop, {what}", "ink title")
    text(
        14,
        46,
        f"Cycles an iteration: matrix {matrix / turns:,.0f}, LDS of {waves} waves "
        f"{lds['lds']:,.0f} + "
        f"{lds['copy to lds']:,.0f} for copies, issue {ISSUE * len(drawn) / turns:,.0f}; as drawn "
        f"{(t1 - t0) / turns:,.0f}, the matrix pipe {matrix / (t1 - t0):.0%} busy",
    )
    height = bottom + 11 * LABELS + 28
    text(
        14,
        height - 12,
        "A box is an instruction, a vertical line a barrier. Cycles are modelled, without "
        "latencies.",
    )
    size = f'width="{WIDTH}" height="{height}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {WIDTH} '
        f'{height}"><style>{STYLE}</style>'
        f'<rect class="paper" {size}/>\n' + "\n".join(shapes) + "\n</svg>\n"
    )


def drawing(
    kernel="dispatch",
    activations="mxfp8",
    tokens=512,
    hidden=2880,
    inner=128,
    experts=2,
    workgroup=0,
):
    """Emulates a layer of made-up experts -> the SVG of its first looping kernel so named."""
    torch.manual_seed(0)
    with gfx950.emulate(trace=workgroup) as gpu:
        moe_gluon.moe(*problem(tokens, hidden, inner, experts, activations))
    loops = [x for x in gpu.launches if (loop := x.counters.loop()) and loop["cycles"]["matrix"]]
    if not (named := [x for x in loops if kernel in x.name]):
        raise SystemExit(
            f"only {[x.name for x in loops]} loop over matrix instructions, no kernel like "
            f"{kernel!r}"
        )
    what = f"{activations}, {tokens} tokens, {experts} experts, {hidden} x {inner}"
    return draw(named[0], what)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--activations", default="mxfp8", choices=moe_gluon.FORMATS)
    for name, default in (
        ("kernel", "dispatch"),
        ("tokens", 512),
        ("hidden", 2880),
        ("inner", 128),
        ("experts", 2),
        ("workgroup", 0),
        ("out", "docs/loop.svg"),
    ):
        parser.add_argument(
            f"--{name}", type=type(default), default=default, help=f"default: {default}"
        )
    options = vars(parser.parse_args())
    out = Path(options.pop("out"))
    out.write_text(drawing(**options))


if __name__ == "__main__":
    main()
