"""The steps to the prefill kernel against the oracle, what the page about them says of their
assembly, its table, and the pictures."""

import functools
import re
import types

import counts
import draw_layouts
import pytest
import steps_prefill
import torch
import triton
from steps_prefill import LAUNCHERS, check, emulated, expected, made_up, routed
from tables import MARK
from test_gfx950_kernels import replace

import gfx950

STEPS = tuple(LAUNCHERS)
OWN = STEPS[:3]  # the last one is moe_gluon's, with tests of its own
pinned_compiler = pytest.mark.skipif(
    not triton.__version__.startswith("3.7."), reason="what triton 3.7.1 compiles"
)
SHAPES = {
    # K is 2.75 steps; experts of 97 and 53 rows; the second panel has 64 columns
    "rows short of a tile": (150, 2, 352, 160, 1),
    # 3 of 4 slots; each expert has a tile of 128 rows and one of 12; a panel has 64 columns
    "K short of a step": (140, 3, 96, 32, 3),
}


@functools.cache
def case_of(shape: str) -> tuple:
    """A made-up layer with a scale that is NaN, of an expert's last columns and K: what `emulated`
    takes, and what the oracle says."""
    layer = made_up(*SHAPES[shape])
    layer.experts.gate_up_scale[-1, -2, -1] = 255
    return routed(layer), expected(layer)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", STEPS)
def test_a_step_against_the_oracle(name, shape):
    case, want = case_of(shape)
    assert want.isnan().any() and not want.isnan().all()
    h, _ = emulated(name, *case, timing="lazy", schedule="skew")
    check(h, want)
    again, _ = emulated(name, *case, timing="random", schedule="random")
    assert torch.equal(h.nan_to_num(), again.nan_to_num())


def test_check_finds_what_is_wrong():
    want = expected(made_up(*SHAPES["rows short of a tile"]))
    assert check(want.clone(), want) == 0
    largest = want.abs() == want.abs().max()
    for wrong in (
        want.where(~largest, want * 1.25),  # by two steps of e4m3
        want.where(~largest, float("nan")),
        want * 1.0625,  # by less than a step, but everywhere
        want.roll(1, 0),
        want[:-1],
    ):
        with pytest.raises(AssertionError):
            check(wrong, want)


# -- mutants of the compiled loops, and what the page says of them


@functools.cache
def full_tile() -> tuple:
    """Likewise, for the kernels of the table: LLVM unrolls the loop of a short K."""
    layer = made_up(128, 1, 2880, 128, 1)
    return routed(layer), expected(layer)


@functools.cache
def looped(name: str) -> tuple:
    """The program of a step, and the places of its loop."""
    launch = emulated(name, *full_tile()[0])[1]
    loop = launch.counters.loop()
    return launch.program, range(loop["first"], loop["last"] + 1)


def caught(name: str, changes: dict[int, str], schedule: str) -> bool:
    """Whether a run with these instructions instead shows it: those of the program in Triton's
    cache, which the next launch executes."""
    case, want = full_tile()
    program, _ = looped(name)
    old = {pc: replace(program, pc, text) for pc, text in changes.items()}
    try:
        check(emulated(name, *case, timing="lazy", schedule=schedule)[0], want)
    except (gfx950.GPUFault, AssertionError):
        return True
    finally:
        for pc, ins in old.items():
            program.code[pc] = ins
    return False


@pinned_compiler
@pytest.mark.parametrize(
    "name, barriers, at_once", [("0, plain", 2, 1), ("1, ring", 1, 1), ("2, sliced", 8, 2)]
)
def test_barriers_of_a_loop_are_needed(name, barriers, at_once):
    """Of the sliced loop two neighbours: its waits are stricter than they must be, as plain loads
    are counted, so that the next barrier comes early enough for one."""
    program, body = looped(name)
    found = [pc for pc in body if program.code[pc].op == "s_barrier"]
    assert len(found) == barriers
    for i in range(0, barriers, at_once):
        assert caught(name, dict.fromkeys(found[i : i + at_once], "s_nop 0"), "skew"), i
    assert not caught(name, {}, "skew")


@pinned_compiler
@pytest.mark.parametrize("name, at_once, by", [("1, ring", 1, 1), ("2, sliced", 8, 2)])
def test_waits_of_a_loop_are_needed(name, at_once, by):
    """Each of the ring's, one looser. Of the sliced loop all, by a piece."""
    program, body = looped(name)
    waits = [pc for pc in body if "vmcnt" in program.code[pc].mods]
    for i in range(0, len(waits), at_once):
        looser = {
            pc: re.sub(
                r"vmcnt\((\d+)\)", lambda m: f"vmcnt({int(m[1]) + by})", program.code[pc].text
            )
            for pc in waits[i : i + at_once]
        }
        assert caught(name, looser, "lockstep"), looser


@pinned_compiler
def test_what_the_page_says_of_the_assembly():
    loops = {}
    for name in STEPS:
        program, body = looped(name)
        loops[name] = [program.code[pc] for pc in body]

    def count(name, pattern):
        return sum(bool(re.match(pattern, ins.text)) for ins in loops[name])

    copies, plain, writes = r"buffer_load_dwordx4.* lds$", r"buffer_load_dwordx4(?!.* lds$)", "ds_w"
    assert [count("0, plain", p) for p in (copies, plain, writes)] == [0, 8, 8]
    assert [count("1, ring", p) for p in (copies, plain, writes)] == [8, 0, 0]
    assert [count("2, sliced", p) for p in (copies, plain, writes)] == [16, 0, 0]  # two steps
    assert [count("3, shipped", p) for p in (copies, plain, writes)] == [16, 0, 0]
    for name in OWN:  # scales, of a step
        steps = 1 + (name == "2, sliced")
        assert count(name, "buffer_load_ubyte") == 4 * steps
        assert count(name, "buffer_load_dword v") == 2 * steps
    assert count("3, shipped", r"buffer_load_dword v.* lds$") == 4
    assert count("3, shipped", "buffer_load") == 20
    assert "vmcnt(0)" in " ".join(ins.text for ins in loops["0, plain"])
    for name in STEPS[1:]:
        assert min(ins.mods["vmcnt"] for ins in loops[name] if "vmcnt" in ins.mods) >= 8

    def products(name):  # between barriers
        regions = " ".join(ins.op for ins in loops[name]).split("s_barrier")
        return [region.count("v_mfma") for region in regions]

    assert max(products("2, sliced")) == 24
    assert products("3, shipped") == [0] + [8] * 8


@pinned_compiler
def test_the_table_is_what_is_counted():
    text = (counts.DOCS / "porting.md").read_text()
    assert dict(MARK.findall(text))["prefill steps"] == steps_prefill.steps_table() + "\n"


def test_figures_of_the_text_are_in_the_table():
    text = (counts.DOCS / "porting.md").read_text()
    table = dict(MARK.findall(text))["prefill steps"]
    steps = text[text.index("### Step 0: through registers") :].partition("\n## ")[0]
    figures = set(re.findall(r"\d+%|\d{1,3},\d{3}|\d{3}(?= cycles)", steps))
    # the matrix cycles of a wave and step, and what docs/kernels.md says the weights are
    assert len(figures) >= 14 and figures - {"1,024", "1,128"} <= set(
        re.findall(r"[\d,]+%?", table)
    )


def test_the_model_by_hand():
    """Instructions of a wave: what it issues is 4 cycles apart, unless it waits."""

    def launch(*instructions):
        code = [
            types.SimpleNamespace(klass=kind, cycles=32 * (kind == "matrix"), mods=mods)
            for kind, mods in instructions
        ]
        counters = types.SimpleNamespace(lds_cycles=[8] * len(code), counts=[4] * len(code))
        return types.SimpleNamespace(
            program=types.SimpleNamespace(code=code),
            trace=[*range(len(code))],
            counters=counters,
            waves=8,
            grid=(2, 1, 1),
        )

    matrix, load, lds = ("matrix", {}), ("vector load", {}), ("lds", {})
    wave = launch(
        load, matrix, ("wait", {"vmcnt": 0}), matrix, lds, ("wait", {"lgkmcnt": 0}), matrix
    )
    # LDS takes 2 cycles for each of 4 waves, from 108 on; then the pipe is still busy
    played = steps_prefill.play(wave, latency=100)
    assert played == ([(4, 36), (104, 136), (136, 168)], {0: 8}, 140)
    # of two loads, one may be on its way
    wave = launch(load, load, ("wait", {"vmcnt": 1}), matrix)
    assert steps_prefill.play(wave, latency=100) == ([(104, 136)], {0: 8}, 108)
    # two workgroups share the pipe, whoever asks first: at 0 and 4, at 10, at 36
    played = steps_prefill.play(launch(matrix, matrix, matrix), 2, delay=10)
    assert played == ([(0, 32), (32, 64), (64, 96), (96, 128)], {}, 100)
    assert steps_prefill.matrix_pipe_busy(launch(*[matrix] * 64), 2, 0) == 1


@pytest.mark.parametrize("name", draw_layouts.DRAWINGS)
def test_a_picture_is_what_is_drawn(name):
    assert (counts.DOCS / name).read_text() == draw_layouts.DRAWINGS[name]()
