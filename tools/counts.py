"""Prints the tables of docs/kernels.md and docs/emulator.md, and writes them and docs/loop.svg.

    python tools/counts.py              writes every table (eight minutes on two cores)
    python tools/counts.py --check      compares the cheap ones; exit 1 if one differs

A table stands between `<!-- counts: NAME -->` and `<!-- end -->`. All are counted by the emulator
or modelled from its counts; KB and MB are powers of 1,000. They depend on the compiler, so that
another Triton than the one in requirements.txt is refused. The drawing is compared but for the
numbers of source lines, which every edit moves."""

import argparse
import collections
import difflib
import math
import re
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import triton
import triton.experimental.gluon.language as gl
from triton.experimental import gluon

sys.path.insert(0, str(Path(__file__).parents[1]))
import draw_loop
from bench_moe import expert_bytes, packed_experts

import gfx950
import gptoss
import moe_gluon
import ops_triton
import weights
from bench import table
from gfx950 import isa

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
ROWS, COLUMNS = moe_gluon.PREFILL_ROWS.value, moe_gluon.PREFILL_COLUMNS.value

# --------------------------------------------------------------------------------------------------
# Layers of the 120b model


def inputs(T: int, E: int, H: int) -> tuple:
    """x and a router under which tokens choose nearly independently."""
    g = torch.Generator().manual_seed(100)
    x = torch.randn(T, H, generator=g) * torch.randn(T, 1, generator=g).exp()
    router = torch.randn(E, H, generator=g) * H**-0.5
    return x.bfloat16(), router.bfloat16(), torch.zeros(E, dtype=torch.bfloat16)


# --------------------------------------------------------------------------------------------------
# Decode


def kb_in_flight(launch, workgroups: int) -> float:
    """KB that a CU has asked for and waits for, modelled, where so many workgroups have work."""
    waves = launch.waves // math.prod(launch.grid)  # of a workgroup
    # Resident on a CU: what its 4 SIMDs hold, in whole workgroups, or what there is for 256.
    resident = min(launch.profile["occupancy"] * 4 // waves * waves, workgroups * waves / 256)
    return resident * launch.counters.peak_bytes_in_flight / 1000


def decode(T: int, activations: str, packed) -> dict:
    """One layer, emulated."""
    with gfx950.emulate() as gpu:
        routing = moe_gluon.gating_gemm(*inputs(T, 128, 2880), packed, 4)
        moe_gluon.combine(*moe_gluon.dispatch_swiglu(routing, packed), routing, packed)
    active = int(routing.num_tiles)
    least = active * sum(
        expert_bytes(w.N * w.K, activations) for w in (packed.gate_up, packed.down)
    )
    requested, flight = collections.Counter(), {}
    for launch in gpu.launches:
        for name, t in launch.counters.tensors.items():
            requested["weights" if name in ("w", "w_scale") else "others"] += t["read"]
        workgroups = active * launch.grid[0] if launch.name == "dispatch_kernel" else launch.grid[0]
        flight[launch.name] = workgroups, kb_in_flight(launch, workgroups)
    return {
        "tokens": T,
        "active": active,
        "launches": len(gpu.launches),
        "weights": requested["weights"] / least,
        "others": requested["others"] / least,
        "flight": flight,
    }


def decode_table(batches: tuple[int, ...]) -> str:
    columns = [
        ("tokens", "tokens", "d"),
        ("active experts", "active", "d"),
        ("launches", "launches", "d"),
        ("weight bytes requested / least", "weights", ".3f"),
        ("all other reads / least", "others", ".2f"),
        ("workgroups gate_up, down", "workgroups", ""),
        ("modelled KB in flight a CU", "kb", ""),
    ]
    packed, rows = packed_experts("fp8"), []
    for T in batches:
        row = decode(T, "fp8", packed)
        gemms = [row["flight"][name] for name in ("dispatch_kernel", "combine_kernel")]
        row["workgroups"] = ", ".join(str(workgroups) for workgroups, _ in gemms)
        row["kb"] = ", ".join(f"{kb:.0f}" for _, kb in gemms)
        rows.append(row)
    return table(columns, rows)


# --------------------------------------------------------------------------------------------------
# A decode step

CACHED = 512  # tokens of each sequence
KINDS = ("sliding_attention", "full_attention")
READS = {
    "w": "experts", "w_scale": "experts", "router_weight": "router", "weight": "dense",
    "pool": "keys",
}  # fmt: skip


def two_layers(experts: int = 128) -> gptoss.GPTOSS:
    """A sliding and a full layer of 120b's shapes, which share their made-up weights, with fp8
    activations. The embeddings are large beside what layers add, so that tokens choose their
    experts nearly independently."""
    config = replace(
        weights.published("120b"),
        num_hidden_layers=1,
        layer_types=("full_attention",),
        num_local_experts=experts,
        vocab_size=64,
    )
    with gfx950.emulate():
        model = gptoss.GPTOSS(weights.random(config, "quark"), ops="gluon")
    model.layers = [replace(model.layers[0], kind=kind) for kind in KINDS]
    model.config = replace(config, num_hidden_layers=2, layer_types=KINDS)
    model.embedding *= 1000
    return model


def emulated_step(model: gptoss.GPTOSS, T: int) -> tuple[list, list[int]]:
    """GPTOSS.forward for T sequences of CACHED tokens -> its launches, active experts by layer."""
    c, ops, active = model.config, model.ops, []
    g = torch.Generator().manual_seed(0)
    pages = T * sum(gptoss.pages_needed(c, CACHED + 1, gptoss.PAGE_SIZE).values())
    cache = gptoss.KVCache(c, pages, gptoss.PAGE_SIZE, model.device, model.dtype)
    cache.pool.normal_(generator=g)
    step = cache.step([[CACHED]] * T, [cache.allocate(CACHED + 1, {}) for _ in range(T)])
    tokens = torch.randperm(c.vocab_size, generator=g)[:T]

    def moe(x, router_weight, router_bias, packed, top_k, *options):
        active.append(len(gptoss.gating(x, router_weight, router_bias, top_k).counts))
        return ops.moe(x, router_weight, router_bias, packed, top_k, *options)

    model.ops = ops._replace(moe=moe)
    with gfx950.emulate() as gpu, torch.inference_mode():
        model.forward(tokens, step, cache.pool)
    model.ops = ops
    return gpu.launches, active


def decode_step(model: gptoss.GPTOSS, T: int) -> dict:
    """The counts of a step: those of the two layers, each as often as 120b has its kind, and of the
    last norm. Bytes read, by kind, beside the least: what is active or visible, once a layer; of
    all else, each byte once a launch."""
    launches, active = emulated_step(model, T)
    c, per_layer = model.config, len(launches) // 2
    times = [weights.published("120b").layer_types.count(kind) for kind in KINDS]
    of_expert = 3 * expert_bytes(c.hidden_size * c.intermediate_size, "fp8")
    visible = [min(CACHED, c.sliding_window - 1), CACHED]  # of a token; its own is not in the cache
    key = 2 * 2 * c.num_key_value_heads * c.head_dim  # bytes of a token: keys and values, bf16
    heads = 2 * (c.num_attention_heads + c.num_key_value_heads) * c.head_dim
    least = collections.Counter(
        experts=sum(n * a * of_expert for n, a in zip(times, active, strict=True)),
        router=sum(times) * 2 * c.num_local_experts * c.hidden_size,
        dense=sum(times) * 2 * heads * c.hidden_size,  # qkv and out, bf16
        keys=sum(n * T * v * key for n, v in zip(times, visible, strict=True)),
    )
    requested, registers, flight = collections.Counter(), collections.Counter(), {}
    for i, launch in enumerate(launches):
        layer, n = i // per_layer, [*times, 1][i // per_layer]
        for name, t in launch.counters.tensors.items():
            kind = READS.get(name, "others")
            requested[kind] += n * t["read"]
            if kind == "others":
                least[kind] += n * t["read_unique"]
        name, workgroups = launch.name.removesuffix("_kernel"), launch.grid[0]
        if name == "decode":
            name = f"attention {KINDS[layer].partition('_')[0]}"
            parts = math.ceil(visible[layer] / ops_triton.SPLIT_KEYS.value)
            workgroups = math.prod(launch.grid[:2]) * parts
        elif name == "dispatch":
            workgroups *= active[layer]
        flight[name] = kb_in_flight(launch, workgroups)
        registers[name] = max(registers[name], launch.profile["vgprs"] + launch.profile["agprs"])
    return {
        "layer": per_layer,
        "step": sum(times) * per_layer + len(launches) - 2 * per_layer,
        "active": active,
        "requested": requested,
        "least": least,
        "registers": registers,
        "spills": sum(
            launch.profile["vgpr_spills"] + launch.profile["sgpr_spills"] for launch in launches
        ),
        "flight": flight,
    }


STEP_BYTES = {
    "experts": "expert weights",
    "router": "router weights",
    "dense": "dense weights",
    "keys": "keys and values",
    "others": "all else: activations, biases, lists, tables",
}


def step_table(batches: tuple[int, ...]) -> str:
    """A column a batch."""
    model, cells = two_layers(), {}
    for T in batches:
        n = decode_step(model, T)
        cell = cells[str(T)] = {
            "launches of a layer; of the step": f"{n['layer']}; {n['step']}",
            "active experts, sliding and full layer": ", ".join(map(str, n["active"])),
        }
        for kind, what in STEP_BYTES.items():
            requested, least = n["requested"][kind], n["least"][kind]
            if requested:
                cell[f"{what}: MB requested; / least"] = (
                    f"{requested / 1e6:,.1f}; {requested / least:.3f}"
                )
        cell["spilled registers"] = str(n["spills"])
        for name, kb in sorted(n["flight"].items()):
            cell[f"{name}: registers; modelled KB in flight a CU"] = (
                f"{n['registers'][name]}; {kb:.1f}"
            )
    columns = [("tokens", "what", ""), *((T, T, "") for T in cells)]
    rows = [{"what": w} | {T: cells[T].get(w) for T in cells} for w in next(iter(cells.values()))]
    return table(columns, rows)


# --------------------------------------------------------------------------------------------------
# Prefill


def full_tiles(activations: str) -> list:
    """The prefill GEMMs at K = 2880 on one tile of 128 rows times 2048 columns, 8 workgroups all of
    whose quadrants are full -> their launches."""
    dispatch = packed_experts(activations, 1, 2880, 1024)
    combine = packed_experts(activations, 1, 2048, 2880)
    with gfx950.emulate() as gpu:
        routing = moe_gluon.gating_gemm(*inputs(128, 1, 2880), dispatch, 1)
        routing.tiles = routing.tiles[:1]  # the one tile there is: no workgroup without work
        moe_gluon.dispatch_swiglu(routing, dispatch)
        # x serves as h: it has the size and format.
        moe_gluon.combine(routing.x, routing.x_scale, routing, combine)
    return [launch for launch in gpu.launches if launch.name.startswith("prefill")]


def figures(launch):
    """A wave's, by the emulator's model: `loop` of one iteration, `outside` of all else of a tile,
    `total`.

    Efficiency, at best: with one workgroup a CU, a wave a SIMD, what is outside the loop adds to
    the matrix cycles, as nothing hides it (in the loop, all else runs under the matrix
    instructions). With two it runs under those of the other, until the matrix pipe, the vector
    pipe, the issue of all else or LDS is busy throughout. No latencies."""
    c, waves, code = launch.counters, launch.waves, launch.program.code
    body = range(c.loop()["first"], c.loop()["last"] + 1)
    # of all waves
    iterations = int(c.counts[next(pc for pc in body if code[pc].op == "s_barrier")])
    # of a wave
    (inside, in_cycles), each = (c.total(body[0], body[-1] + 1, iterations), iterations // waves)
    total = {k: n / waves for k, n in c.cycles.items()}

    def others(instructions, divide):  # cycles to issue all but matrix and vector instructions
        return 4 * sum(n for k, n in instructions.items() if k not in ("matrix", "vector")) / divide

    outside = {
        "at 4": 4 * (c.instructions["vector"] / waves - each * inside["vector"]),
        "vector": total["vector"] - each * in_cycles["vector"],
        "others": others(c.instructions, waves) - each * others(inside, 1),
    }
    loop = {
        "matrix": in_cycles["matrix"],
        "lds": 4 * in_cycles["lds"],
        "conflicts": 4 * in_cycles["bank conflicts"],
        "lds reads": 4
        * sum(int(c.lds_cycles[pc]) for pc in body if code[pc].op.startswith("ds_"))
        / iterations,
        "issue": 4 * inside["vector"] + others(inside, 1),
    }
    alone = total["matrix"] + outside["vector"] + outside["others"]
    pair = max(
        2 * total["matrix"],
        2 * total["vector"],
        2 * others(c.instructions, waves),
        8 * total["lds"],
        alone,
    )
    return types.SimpleNamespace(
        inside=inside,
        loop=loop,
        outside=outside,
        total=total,
        one=total["matrix"] / alone,
        two=2 * total["matrix"] / pair,
    )


LOOP_ROWS = (
    "registers; LDS KB; waves a SIMD",
    "loop, matrix cycles for 512 of K",
    "LDS cycles of all waves, reads; of them bank conflicts",
    "with the copies' writes, at half the rate",
    "issue, 4 cycles for all but matrix instructions",
    "outside the loop: vector cycles (4 an instruction) / matrix cycles of the tile",
    "matrix pipe busy at best: one workgroup a CU; two",
)


def loop_table(formats: tuple[str, ...]) -> str:
    """gate_up's loop and what lies around it, a column a format."""
    cells = {}
    for activations in formats:
        launch = full_tiles(activations)[0]
        n, p = figures(launch), launch.profile
        ring = moe_gluon.prefill_tile(128, 64, moe_gluon.FORMATS[activations]).RING
        per = 512 / (ring * (32 if activations == "bf16" else 128))  # iterations for 512 of K
        loop, matrix = n.loop, n.total["matrix"]
        cells[activations] = (
            f"{p['vgprs'] + p['agprs']}; {p['lds'] / 1000:.0f}; {p['occupancy']}",
            f"{per * loop['matrix']:.0f}",
            f"{per * loop['lds reads']:.0f}; {per * loop['conflicts']:.0f}",
            f"{per * loop['lds']:.0f}",
            f"{per * loop['issue']:.0f}",
            f"{n.outside['at 4'] / 1000:.1f} k / {matrix / 1000:.1f} k",
            f"{n.one:.0%}; {n.two:.0%}",
        )
    columns = [("gate_up", "what", ""), *((f"{a}", a, "") for a in formats)]
    rows = [{"what": what} | {a: cells[a][i] for a in formats} for i, what in enumerate(LOOP_ROWS)]
    return table(columns, rows)


@gluon.jit
def order_kernel(out, tiles, num_tiles, g: gl.constexpr):
    tile, start = moe_gluon.tile_of_program(tiles, num_tiles, g)
    out += 3 * gl.program_id(0)
    gl.store(out, tile.expert)
    gl.store(out + 1, start)
    gl.store(out + 2, tile.count)


def order(tiles, N):
    """(tile, block of columns) that the workgroups of each chiplet take, in order."""
    blocks = -(-N // COLUMNS)
    programs = torch.empty(-(-tiles * blocks // 8) * 8, 3, dtype=torch.int32)
    listed = torch.stack(
        [torch.arange(tiles), torch.zeros(tiles), torch.ones(tiles), torch.zeros(tiles)], 1
    ).int()
    with gfx950.emulate():
        order_kernel[(len(programs),)](
            programs,
            listed,
            torch.tensor([tiles], dtype=torch.int32),
            moe_gluon.prefill_tile(128, N, moe_gluon.FORMATS["fp8"]),
            num_warps=1,
        )
    chiplets = [
        [(t, n // COLUMNS) for t, n, count in programs[i::8].tolist() if count] for i in range(8)
    ]
    # all, once
    assert sorted(sum(chiplets, [])) == [(t, b) for t in range(tiles) for b in range(blocks)]
    return chiplets


def prefill_bytes(T: int) -> list[dict]:
    """Of 120b's GEMMs for tokens that choose 4 of 128 experts independently. What is requested is
    exact: a tile asks for its columns of weights once, a panel for its rows once. What comes from
    memory is modelled: the L2 of a chiplet keeps what the 64 workgroups share that run there at a
    time, and nothing longer."""
    g = torch.Generator().manual_seed(0)
    chosen = torch.rand(T, 128, generator=g).topk(4).indices.flatten()
    rows = chosen.bincount(minlength=128).tolist()
    tiles = [(e, min(ROWS, r - i)) for e, r in enumerate(rows) for i in range(0, r, ROWS)]
    found = []
    for name, N, K in (("gate_up", 5760, 2880), ("down", 2880, 2880)):
        blocks = -(-N // COLUMNS)
        columns = [min(COLUMNS, N - COLUMNS * b) for b in range(blocks)]
        read_columns = read_rows = 0  # from memory
        for chiplet in order(len(tiles), N):
            for i in range(0, len(chiplet), 64):
                now = chiplet[i : i + 64]
                read_columns += sum(columns[b] for _, b in {(tiles[t][0], b) for t, b in now})
                read_rows += sum(tiles[t][1] for t in {t for t, _ in now})
        x = sum(rows) * K  # bytes of fp8 activations
        found.append(
            {
                "tokens": T,
                "gemm": name,
                "weights": 128 * expert_bytes(N * K, "fp8") / 1e6,
                "requested": len(tiles) / 128,
                "from_memory": read_columns / 128 / N,
                "x": x / 1e6,
                "x_requested": x * blocks / 1e6,
                "x_from_memory": x * read_rows / sum(rows) / 1e6,
            }
        )
    return found


def bytes_table() -> str:
    columns = [
        ("tokens", "tokens", "d"),
        ("GEMM", "gemm", ""),
        ("weights, MB", "weights", ",.0f"),
        ("requested / least", "requested", ".3f"),
        ("from memory / least, modelled", "from_memory", ".3f"),
        ("activations (fp8), MB", "x", ".1f"),
        ("requested", "x_requested", ",.0f"),
        ("from memory, modelled", "x_from_memory", ".0f"),
    ]
    return table(columns, prefill_bytes(1024) + prefill_bytes(4096))


# --------------------------------------------------------------------------------------------------
# The emulator


def instruction_table() -> str:
    """How many arithmetic mnemonics the emulator knows."""
    groups = collections.Counter(name.partition("_")[0] for name in isa.ALU)
    rows = [{"prefix": f"`{prefix}_`", "count": n} for prefix, n in sorted(groups.items())]
    return table([("arithmetic instructions", "prefix", ""), ("known", "count", "d")], rows)


# --------------------------------------------------------------------------------------------------
# The files

# name -> what prints it, and whether it is cheap enough to be compared by CI
TABLES: dict[str, tuple[Callable[[], str], bool]] = {
    "decode": (lambda: decode_table((1, 4)), True),
    "decode, more tokens": (lambda: decode_table((8, 16)), False),
    "decode step": (lambda: step_table((1, 8)), False),
    "prefill loop, 8-bit activations": (lambda: loop_table(("fp8", "mxfp8")), True),
    "prefill loop, mxfp4 and bf16": (lambda: loop_table(("mxfp4", "bf16")), False),
    "prefill bytes": (bytes_table, True),
    "instructions": (instruction_table, True),
}
MARK = re.compile(r"<!-- counts: (.*?) -->\n(.*?)<!-- end -->", re.S)


def same_drawing(a: str, b: str) -> bool:
    """Whether two drawings differ in nothing but the numbers of source lines."""
    line = re.compile(r"moe_gluon\.py:\d+")
    return line.sub("", a) == line.sub("", b)


def main() -> int:
    pinned = re.search(r"^triton==([\d.]+)", (ROOT / "requirements.txt").read_text(), re.M)[1]
    if triton.__version__ != pinned:
        sys.exit(f"docs/ holds what triton {pinned} compiles, this is {triton.__version__}")
    parser = argparse.ArgumentParser(description="Write or check the tables of docs/.")
    parser.add_argument("--check", action="store_true", help="compare the cheap tables, write none")
    args, wrong = parser.parse_args(), 0
    for file in sorted(DOCS.glob("*.md")):
        text = file.read_text()
        for name, old in MARK.findall(text):
            make, cheap = TABLES[name]
            if args.check and not cheap:
                continue
            new = make() + "\n"
            print(f"{file.name}: {name}{' is as printed' * (old == new)}", file=sys.stderr)
            if args.check and old != new:
                wrong = 1
                diff = difflib.unified_diff(old.splitlines(), new.splitlines(), "file", "counted")
                print("\n".join(diff))
            mark = f"<!-- counts: {name} -->\n"
            text = text.replace(mark + old, mark + new)
        if not args.check:
            file.write_text(text)
    drawing, file = draw_loop.drawing(), DOCS / "loop.svg"
    if not args.check:
        file.write_text(drawing)
    elif not same_drawing(drawing, file.read_text()):
        print("docs/loop.svg is not what tools/draw_loop.py draws: run it")
        wrong = 1
    return wrong


if __name__ == "__main__":
    sys.exit(main())
