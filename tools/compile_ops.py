"""Compiles the kernels of ops_triton.py, and of moe_nvidia.py for an NVIDIA GPU, at the models'
sizes for GPUs that are not here, and prints what the compiler says of each: registers, spills,
shared memory, how wide it loads, and of an NVIDIA GPU the instructions of the longest loop, and the
order of its loads and products.

    python tools/compile_ops.py sm_90             # also sm_80, sm_86, sm_120, gfx942, gfx950
    python tools/compile_ops.py sm_90 --keep ptx  # writes each kernel's assembly to ptx/
"""

import argparse
import re
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.cache import get_cache_manager

sys.path.insert(0, str(Path(__file__).parents[1]))
import attention_nvidia
import moe_nvidia
import ops_triton
import weights

SHARED = {  # bytes that a program may have
    "sm_80": 166912,
    "sm_86": 101376,
    "sm_90": 232448,
    "sm_120": 101376,
    "gfx942": 65536,
    "gfx950": 163840,
}
SHOWN = re.compile(
    r"^\s*(?:@!?%\w+ )?((?:ld|st|cp\.async)\.[\w.]*(?:global|shared)[\w.]*|wgmma\.mma_async\S*"
    r"|mma\.sync\S*|bar\.sync|shfl\.\S*|(?:global|buffer)_(?:load|store)\w*"
    r"|ds_(?:read|write|bpermute)\w*|v_mfma\w*|s_barrier)",
    re.M,
)


@dataclass
class Compiled:
    name: str
    grid: tuple
    registers: int
    spills: int  # bytes
    shared: int  # bytes
    text: str  # PTX or AMD assembly
    order: list[str]  # names of the machine instructions of the longest loop; empty on AMD

    @property
    def loop(self) -> Counter:
        return Counter(self.order)

    def instructions(self) -> Counter:
        """How often the assembly has each memory, matrix and synchronising instruction."""
        return Counter(SHOWN.findall(self.text))


def target_of(name: str) -> GPUTarget:
    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name[3:]), 32)
    return GPUTarget("hip", name, 64)


def read(name: str, metadata, target: GPUTarget) -> tuple[int, int, str, list[str]]:
    """Registers, spilled bytes, assembly and longest loop of a kernel in Triton's cache."""
    cache = get_cache_manager(metadata.hash)
    if target.backend == "hip":
        text = Path(cache.get_file(f"{name}.amdgcn")).read_text()
        registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])
        spills = int(re.search(r"\.private_segment_fixed_size: (\d+)", text)[1])
        return registers, spills, text, []

    def tool(*command: str) -> str:
        path = Path(triton.__path__[0]) / "backends/nvidia/bin" / command[0]
        command = [path, *command[1:], cache.get_file(f"{name}.cubin")]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    found = re.search(r"REG:(\d+) STACK:(\d+).*LOCAL:(\d+)", tool("cuobjdump", "-res-usage"))
    registers, stack, local = map(int, found.groups())
    text = Path(cache.get_file(f"{name}.ptx")).read_text()
    return registers, stack + local, text, longest_loop(tool("nvdisasm", "-c"))


def longest_loop(listing: str) -> list[str]:
    """Names of the instructions between a label and the branch back to it, in nvdisasm's
    listing."""
    labels, names, longest = {}, [], []
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(names)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z]\w*)", line):
            names.append(instruction[1])
            back = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)
            if back and back[1] in labels and len(names) - labels[back[1]] > len(longest):
                longest = names[labels[back[1]] :]
    return longest


@contextmanager
def compiling_for(name: str):
    """Inside the block launches compile for the GPU `name` and run nothing; tensors may be on the
    meta device. Yields the list of Compiled."""
    target = target_of(name)

    class Launcher:
        def __init__(self, src, metadata):
            self.src, self.metadata = src, metadata
            self.what = read(src.name[:150], metadata, target)

        def __call__(self, x, y, z, *_):
            registers, spills, *text_and_loop = self.what
            shared = self.metadata.shared
            kernel = Compiled(self.src.name, (x, y, z), registers, spills, shared, *text_and_loop)
            triton.runtime.driver.active.state.append(kernel)

    with driving(name, Launcher, [], "meta", "not here") as found:
        yield found


@contextmanager
def driving(name: str, launcher: type, state, place: str, where: str):
    """Inside the block Triton compiles for the GPU `name`, whose tensors are on the device `place`,
    and `launcher` launches. Yields `state`, which is triton.runtime.driver.active.state there; a
    kernel outlives it. where: apart from that of other drivers, whose kernels are not these."""
    target = target_of(name)

    class Driver:
        launcher_cls = launcher

        class utils:
            load_binary = staticmethod(lambda name, *_: (name, name, 0, 0, 1024))
            get_device_properties = staticmethod(
                lambda _: dict(
                    max_shared_mem=SHARED[name], multiprocessor_count=132, warpSize=target.warp_size
                )
            )

        get_current_target = staticmethod(lambda: target)
        get_current_device = staticmethod(lambda: f"{name}, {where}")
        get_current_stream = staticmethod(lambda _: 0)
        get_active_torch_device = staticmethod(lambda: torch.device(place))

    config = triton.runtime.driver
    before = config._active
    Driver.state = state
    config.set_active(Driver())
    try:
        yield state
    finally:
        config._active = before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("gpu", choices=SHARED)
    parser.add_argument("--model", default="120b", choices=["20b", "120b"])
    parser.add_argument("--keep", type=Path)
    args = parser.parse_args()
    c = weights.published(args.model)
    cases = [(launch_layer, T) for T in (1, 512, 4096)]
    if args.gpu.startswith("sm_"):
        cases += [(partial(launch_moe, moe_nvidia), T) for T in (1, moe_nvidia.MAX_TOKENS)]
        cases += [(partial(launch_attention, attention_nvidia), 1)]
    for launch, T in cases:
        with compiling_for(args.gpu) as found:
            launch(c, T)
        for k in found:
            print(f"T={T} {k.name} grid={k.grid} registers={k.registers}", end=" ")
            print(f"spills={k.spills} shared={k.shared}")
            print("   ", ", ".join(f"{n} {i}" for i, n in k.instructions().most_common()))
            if k.loop:
                common = ", ".join(f"{n} {i}" for i, n in k.loop.most_common(12))
                print(f"    loop of {k.loop.total()}: {common}")
                print("   ", *(i for i in k.order if i in ("LDG", "LDGSTS", "HMMA", "HGMMA")))
            if args.keep:
                args.keep.mkdir(exist_ok=True)
                (args.keep / f"{k.name}_{T}_{found.index(k)}.txt").write_text(k.text)


def launch_layer(
    c: weights.Config, T: int, activations="bf16", dtype=torch.bfloat16, mxfp4=True
) -> None:
    """The operations of a layer on meta tensors: T = 1 is a decode step, else a prompt. mxfp4: the
    experts are, else bfloat16."""

    def new(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    H = c.hidden_size
    N, G, D = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    ops_triton.add_norm(new(T, H), new(T, H), new(H, dtype=torch.float32), 1e-5)
    if T == 1:
        calls = new(64, dtype=torch.int32)
        peers = ops_triton.Peers(0, (1 << 40, 3 << 40), calls, calls)
        ops_triton.sum_norm(new(T, H), new(T, H), new(H, dtype=torch.float32), 1e-5, peers)
    for rows, columns in (((N + 2 * G) * D, H), (H, N * D)):  # queries, keys and values; the output
        ops_triton.linear(new(T, columns), new(rows, columns), new(rows))
    launch_attention(ops_triton, c, T, dtype)
    launch_moe(ops_triton, c, T, activations, dtype, mxfp4)


def launch_attention(room, c: weights.Config, T: int, dtype=torch.bfloat16) -> None:
    """Both kinds of layers' attention, of ops_triton or, of one token, attention_nvidia."""

    def new(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    N, G, D = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    table = new(1, 256, dtype=torch.int32)
    step = ops_triton.Plan(
        cos=new(T, D // 2, dtype=torch.float32),
        sin=new(T, D // 2, dtype=torch.float32),
        positions=new(1, T, dtype=torch.int32),
        newest=new(1, dtype=torch.int32),
        tables=dict.fromkeys(weights.LAYER_TYPES, table),
        page_size=16,
        window=c.sliding_window,
        arrived=new(G, dtype=torch.int32),
    )
    for kind in weights.LAYER_TYPES:
        room.attention(new(T, (N + 2 * G) * D), new(N), new(4096, 2, G, D), kind, step)


def launch_moe(
    room, c: weights.Config, T: int, activations="bf16", dtype=torch.bfloat16, mxfp4=True
) -> None:
    """The layer of ops_triton or moe_nvidia, which read the same weights."""

    def new(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    H, inner, E = c.hidden_size, c.intermediate_size, c.num_local_experts

    def weight(N, K):
        if not mxfp4:
            return ops_triton.Weight(
                new(E, N, K, dtype=torch.bfloat16), None, new(E, N), 1.0, False, N, K
            )
        blocks = -(-K // 64), -(-N // 16)
        data = new(E, *blocks, 8, 4, 4, dtype=torch.int32)
        scale, bias = new(E, *blocks, 8, dtype=torch.int32), new(E, N, dtype=torch.float32)
        return ops_triton.Weight(data, scale, bias, 1.0, False, N, K)

    arrived = new(1 << 10, dtype=torch.int32)
    packed = ops_triton.Packed(weight(2 * inner, H), weight(H, inner), activations, arrived)
    k = c.num_experts_per_tok
    room.moe(new(T, H), new(E, H), new(E), packed, k, activations, c.swiglu_limit)


if __name__ == "__main__":
    main()
