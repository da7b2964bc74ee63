"""Draws where a kernel's numbers lie, from the layouts that moe_gluon.py compiles with:
docs/operand.svg and docs/tile.svg.

    python tools/draw_layouts.py            writes both
    python tools/draw_layouts.py --check    exit 1 if one is not what this draws

Lanes, waves and registers are Triton's own answer for the layouts in the fields of the tiles.
Where a byte lies in memory is found by packing an expert whose bytes are numbers of their own."""

import argparse
import ast
import inspect
import sys
from html import escape
from pathlib import Path

import torch
from triton._C.libtriton import amd, gluon_ir, ir

sys.path.insert(0, str(Path(__file__).parents[1]))
from draw_loop import STYLE

import moe_gluon

DOCS = Path(__file__).parents[1] / "docs"
K, N = 2880, 5760  # gate_up of 120b
LANE = 37  # of the operand that is highlighted: column 5, group 2
RESULT_LANE = 21  # of the sums: row 5, columns from 4

# --------------------------------------------------------------------------------------------------
# Layouts


def holders(layout, shape: list[int]) -> dict[tuple[int, int], list[tuple[int, ...]]]:
    """(wave, lane) -> the coordinates of what it holds, in the order of its registers."""
    context = ir.context()
    ir.load_dialects(context)
    amd.load_dialects(context)
    builder = gluon_ir.GluonOpBuilder(context)
    linear = builder.to_linear_layout(layout._to_ir(builder), shape)

    def coordinates(number, bases):  # exclusive or of the bases of its bits
        at = [0] * len(shape)
        for bit, base in enumerate(bases):
            if number >> bit & 1:
                at = [a ^ b for a, b in zip(at, base, strict=True)]
        return at

    found = {}
    for wave in range(1 << len(linear.warp_bases)):
        for lane in range(1 << len(linear.lane_bases)):
            held = found[wave, lane] = []
            for register in range(1 << len(linear.reg_bases)):
                parts = (
                    coordinates(register, linear.reg_bases),
                    coordinates(lane, linear.lane_bases),
                    coordinates(wave, linear.warp_bases),
                )
                held.append(tuple(a ^ b ^ c for a, b, c in zip(*parts, strict=True)))
    return found


def packed_block() -> tuple[dict[tuple[int, int], int], dict[tuple[int, int], int]]:
    """(column, byte of 64) and (column, group of 4) -> where they lie, of 64 columns and a step of
    K that are all there is: the bytes of a strip follow each other, then those of the next."""
    column = torch.arange(64, dtype=torch.uint8)[:, None]
    byte, bias = torch.arange(64, dtype=torch.uint8), torch.zeros(1, 64)
    scale = (column * 4 + byte[:4])[None]

    def packed(weight, scale=scale):
        return moe_gluon.pack(weight[None].contiguous(), scale, bias, 1.0)

    columns = packed(column.expand(64, 64)).data.flatten().tolist()
    bytes_of = packed(byte.expand(64, 64)).data.flatten().tolist()
    # of weights that are 0, so that no scale is taken for an infinity's
    scales = packed(torch.zeros(64, 64, dtype=torch.uint8)).scale.flatten().tolist()
    return (
        {key: at for at, key in enumerate(zip(columns, bytes_of, strict=True))},
        {(s // 4, s % 4): at for at, s in enumerate(scales)},
    )


def column_of(position: int) -> int:
    """As moe_gluon.column_of, which runs in kernels only."""
    return moe_gluon.column_of.fn(position).value


def order_of_quadrants() -> list[str]:
    """As sliced_step multiplies them."""
    body = ast.parse(inspect.getsource(moe_gluon.sliced_step.fn)).body[0]
    return [
        node.targets[0].id
        for node in ast.walk(body)
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Call)
        and getattr(node.value.func, "id", "") == "mfma"
    ]


# --------------------------------------------------------------------------------------------------
# Drawing


class Drawing:
    """Shapes of the classes in draw_loop.STYLE: c0 orange, c1 blue, c2 green, c3 violet, ink,
    grid."""

    def __init__(self):
        self.shapes: list[str] = []

    def text(self, x, y, content, style="ink", anchor="start"):
        self.shapes.append(
            f'<text class="{style}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">'
            f"{escape(str(content))}</text>"
        )

    def box(self, style, x, y, width, height, opacity=1.0):
        self.shapes.append(
            f'<rect class="{style}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" '
            f'fill-opacity="{opacity:g}"/>'
        )

    def funnel(self, style, top, bottom):
        """From the span `top` (left, right, y) to the span `bottom`."""
        (a, b, y), (c, d, z) = top, bottom
        self.shapes.append(
            f'<path class="{style}" fill-opacity=".12" d="M{a:g} {y:g}H{b:g}L{d:g} {z:g}H{c:g}Z"/>'
        )

    def svg(self, width, height) -> str:
        size = f'width="{width}" height="{height}"'
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {width} {height}">'
            f'<style>{STYLE}</style><rect class="paper" {size}/>\n'
            + "\n".join(self.shapes)
            + "\n</svg>\n"
        )


def span(numbers) -> str:
    """4 .. 7 of consecutive numbers."""
    numbers = sorted(numbers)
    assert numbers == list(range(numbers[0], numbers[-1] + 1))
    return f"{numbers[0]} .. {numbers[-1]}"


def operand() -> str:
    """One lane's part of the packed weights and of their scales, of the first of the 16 x 16."""
    g = moe_gluon.dispatch_tile(K, N, moe_gluon.FORMATS["mxfp8"])
    values = holders(g.w, [g.WAVES, 64, g.BN])
    scales = holders(g.w_scale, [g.WAVES, g.BN, 4])
    value_at, scale_at = packed_block()

    def of_lane(lane):  # position, bytes of K, their places in memory
        held = [(byte, n) for _, byte, n in values[0, lane] if n < 16]
        (n,) = {n for _, n in held}
        places = [value_at[column_of(n), byte] for byte, n in held]
        assert places == list(range(places[0], places[0] + g.lane))  # 16 bytes in a row
        return n, [byte for byte, _ in held], places

    d, left, cell, high = Drawing(), 130, 50, 24
    position, held, places = of_lane(LANE)
    d.text(
        14, 24, "A lane's part of the packed weights: v_mfma_scale_f32_16x16x128, e2m1", "ink title"
    )
    d.text(
        14,
        48,
        "The operand, 16 positions by 128 of K. A cell is a lane: 32 values of K of a position.",
    )
    y = 84
    d.text(left - 10, y - 18, "position", "ink small", "end")
    d.text(left - 10, y - 5, "is column", "c1 small", "end")
    for n in range(16):
        d.text(left + cell * (n + 0.5), y - 18, n, "ink small", "middle")
        d.text(left + cell * (n + 0.5), y - 5, column_of(n), "c1 small", "middle")
    for lane in range(64):
        n, bytes_of, _ = of_lane(lane)
        row = bytes_of[0] // g.lane
        x, mine = left + cell * n, lane == LANE
        d.box("c0" if mine else "grid", x + 1, y + high * row + 1, cell - 2, high - 2)
        style = "paper bold" if mine else "ink small"
        d.text(x + cell / 2, y + high * row + 16, lane, style, "middle")
        if n == 0:
            k = f"K {2 * bytes_of[0]} .. {2 * bytes_of[-1] + 1}"
            d.text(left - 10, y + high * row + 16, k, "ink small", "end")
    of_cell = (
        left + cell * position,
        left + cell * (position + 1),
        y + high * (held[0] // g.lane + 1),
    )

    y, slot = 240, 12.5
    d.text(14, y - 22, "In memory, a strip's step: 1,024 bytes, lane after lane", "ink")
    for lane in range(64):
        at = of_lane(lane)[2][0] // g.lane
        d.box("c0" if lane == LANE else "grid", left + slot * at + 0.5, y, slot - 1, high)
    for byte in range(0, 1025, 256):
        x = left + slot * byte / g.lane
        d.text(x, y + high + 13, f"byte {byte:,}", "ink small", "middle")
    at = left + slot * places[0] / g.lane
    d.funnel("c0", of_cell, (at, at + slot, y))

    zoom, below = 50, y + high + 44
    d.funnel("c0", (at, at + slot, y + high), (left, left + zoom * g.lane, below))
    d.text(14, below + 8, "its 16 bytes", "c0 bold")
    d.text(14, below + 22, "K of low, high code", "ink small")
    d.text(14, below + 36, "byte of the step", "ink small")
    for i, (byte, place) in enumerate(zip(held, places, strict=True)):
        x = left + zoom * i
        d.box("c0", x + 1, below, zoom - 2, high, 0.35)
        d.text(x + zoom / 2, below + 16, f"{2 * byte}, {2 * byte + 1}", "ink small", "middle")
        d.text(x + zoom / 2, below + 36, place, "ink small", "middle")

    y = below + 90
    group = {k for _, _, k in scales[0, LANE]}
    dword = [(n, k, scale_at[column_of(n), k]) for _, n, k in scales[0, LANE]]
    assert group == {held[0] // g.lane} and dword[0][2] % 4 == 0
    assert [at for *_, at in dword] == list(range(dword[0][2], dword[0][2] + 4))
    d.text(14, y - 22, "Scales of a block's step, 64 positions: 256 bytes, a dword a lane", "ink")
    for lane in range(64):
        at = min(scale_at[column_of(n), k] for _, n, k in scales[0, lane]) // 4
        d.box("c1" if lane == LANE else "grid", left + slot * at + 0.5, y, slot - 1, high)
    for byte in range(0, 257, 64):
        d.text(left + slot * byte / 4, y + high + 13, f"byte {byte}", "ink small", "middle")
    at, zoom, below = left + slot * dword[0][2] / 4, 200, y + high + 44
    d.funnel("c1", (at, at + slot, y + high), (left, left + zoom * 4, below))
    d.text(14, below + 16, "its dword", "c1 bold")
    for i, (n, _, place) in enumerate(dword):
        x = left + zoom * i
        d.box("c1", x + 1, below, zoom - 2, 2 * high, 0.35 if i == 0 else 0.18)
        of = f"byte {place}: position {n}, column {column_of(n)}"
        d.text(x + zoom / 2, below + 18, of, "ink small", "middle")
        use = f"16 x 16 number {n // 16}" + " (above)" * (i == 0)
        d.text(x + zoom / 2, below + 36, use, "ink small", "middle")
    d.text(
        14, below + 76,
        f"The scales of a dword are all for K {2 * held[0]} .. "
        f"{2 * held[-1] + 1}; the instruction picks the byte of its 16 x 16 by op_sel.",
    )  # fmt: skip
    return d.svg(left + 16 * cell + 50, below + 92)


def tile() -> str:
    """The prefill tile: quadrants, waves, and what a lane has of a wave's part of one."""
    held = holders(moe_gluon.prefill_tile(K, N, moe_gluon.FORMATS["mxfp8"]).acc, [64, 128])
    d, left, top = Drawing(), 110, 98
    d.text(14, 24, "The prefill tile: 128 rows by 256 positions, cut 2 x 2", "ink title")
    d.text(
        14, 46,
        f"All four waves multiply a quadrant together, {len(held[0, 0]) // 4} matrix instructions "
        "each, in the order of the numbers.",
    )  # fmt: skip
    quadrants(d, held, left, top)
    rows_of_a_wave(d, held, 0, left, top + 404)
    return d.svg(990, top + 404 + 32 * 13 + 40)


def quadrants(d: Drawing, held: dict, left: float, top: float) -> None:
    wide, tall = 3.3, 2.5  # pixels of a position, of a row
    for half, name in enumerate(("w left", "w right")):
        x = left + wide * 128 * half
        d.box("c1", x + 1, top - 30, wide * 128 - 2, 24, 0.35)
        positions = span(range(128 * half, 128 * half + 128))
        d.text(x + wide * 64, top - 14, f"{name}: positions {positions}", "ink small", "middle")
    for half, name in enumerate(("x top:", "x bottom:")):
        y = top + tall * 64 * half
        d.box("c2", 14, y + 1, 90, tall * 64 - 2, 0.35)
        d.text(59, y + tall * 32 - 4, name, "ink small", "middle")
        rows = span(range(64 * half, 64 * half + 64))
        d.text(59, y + tall * 32 + 10, f"rows {rows}", "ink small", "middle")
    for number, name in enumerate(order_of_quadrants(), 1):
        x = left + wide * 128 * ("right" in name)
        y = top + tall * 64 * ("bottom" in name)
        for wave in range(4):
            cells = [cell for lane in range(64) for cell in held[wave, lane]]
            rows, columns = sorted({r for r, _ in cells}), sorted({c for _, c in cells})
            assert len(cells) == len(set(cells)) == len(rows) * len(columns)
            assert span(rows) and span(columns)
            at = x + wide * columns[0] + 1.5, y + tall * rows[0] + 1.5
            d.box(f"c{wave}", *at, wide * len(columns) - 3, tall * len(rows) - 3, 0.22)
            middle = x + wide * (columns[0] + len(columns) / 2)
            d.text(middle, at[1] + 16, f"wave {wave}", "ink small", "middle")
        d.box("paper", x + wide * 64 - 66, y + tall * 32 - 13, 132, 26)
        label = f"{number}. {name.replace('_', ' ')}"
        d.text(x + wide * 64, y + tall * 32 + 5, label, "ink bold", "middle")


def rows_of_a_wave(d: Drawing, held: dict, wave: int, left: float, y: float) -> None:
    """Its part of a quadrant; a box is four positions of a row, which one lane holds."""
    cell, gap, mine = 13.0, 4.0, held[wave, RESULT_LANE]
    assert sorted(mine) == sorted((r, c + i) for r, c in mine[::4] for i in range(4))
    d.text(
        14,
        y - 42,
        f"Wave {wave}'s part of a quadrant: 32 rows by 64 positions, eight 16 x 16. A box is four "
        f"positions, which a lane holds; lane {RESULT_LANE} holds the filled ones.",
    )
    d.text(left - 10, y - 18, "position", "ink small", "end")
    d.text(left - 10, y - 5, "is column", "c1 small", "end")
    for lane in range(64):
        for r, c in held[wave, lane][::4]:
            at = left + cell * c + gap * (c // 16), y + cell * r + gap * (r // 16)
            d.box("c0" if lane == RESULT_LANE else "grid", *at, 4 * cell - 1, cell - 1)
    for c in range(0, 64, 4):
        at = left + cell * (c + 2) + gap * (c // 16)
        style = "c0 bold" if (mine[0][0], c) in mine else "ink"
        d.text(at, y - 18, f"{c} .. {c + 3}", f"{style} small", "middle")
        d.text(at, y - 5, f"{column_of(c)} .. {column_of(c + 3)}", "c1 small", "middle")
    for r in sorted({r for r, _ in mine}):
        d.text(left - 10, y + cell * r + gap * (r // 16) + 10, f"row {r}", "c0 small", "end")
    columns = span({column_of(c) for _, c in mine})
    d.text(
        14,
        y + cell * 32 + 26,
        "Positions are dealt so that what a lane has of a row are consecutive columns, here "
        f"{columns}: gate and up lie side by side, and are stored at once.",
    )


DRAWINGS = {"operand.svg": operand, "tile.svg": tile}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write none, exit 1 if one differs")
    check, wrong = parser.parse_args().check, 0
    for name, draw in DRAWINGS.items():
        if not check:
            (DOCS / name).write_text(draw())
        elif (DOCS / name).read_text() != draw():
            print(f"docs/{name} is not what tools/draw_layouts.py draws: run it")
            wrong = 1
    return wrong


if __name__ == "__main__":
    sys.exit(main())
