"""Times OpenAI's own Triton GPT-OSS on a CUDA GPU, with made-up weights of the true shapes.

    pip install --no-deps gpt-oss==0.0.9 tokenspeed-triton-kernels==1.0.0.post20260510
    python tools/peer_gpu.py                                    both sizes, layers and whole models
    python tools/peer_gpu.py --model 20b --concurrency 1,8 --tokens 1,64 --json

The layer is triton_kernels' MoE: bf16 activations, MXFP4 weights in the layouts that the package
chooses for the GPU. The model is gpt_oss.triton's, embedding to logits, with that layer in place of
its own, which a later triton_kernels than it knows replaced.

A layer's time is that of one of 8 calls in a CUDA graph, each with other weights and other random
tokens. A step is one token of every sequence as a CUDA graph, as TokenGenerator captures it,
without sampling. Its attention reads the whole cache, so its time depends on the room in the cache
rather than on the tokens there. Prefill is one prompt without a graph, as TokenGenerator runs it;
its time includes the launches. Medians are of 20 rounds, a replay or a prompt each, after warm-up.

Tables go to stdout, each row to stderr as soon as it is measured; exit 0, 1 (packages or GPU
missing, or a row failed), 2 (usage)."""

import argparse
import gc
import importlib
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
import triton
import triton.language.target_info
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
import bench
import weights

INSTALL = "pip install --no-deps gpt-oss==0.0.9 tokenspeed-triton-kernels==1.0.0.post20260510"
PACKAGES = ("triton_kernels", "gpt_oss", "pytest")  # gpt_oss's attention imports pytest
DEVICE = torch.device("cuda")
ROUNDS, WARM_UP = 20, 3
CALLS = 8  # of a layer in a graph
NEW_TOKENS = 128  # that the caches have room for after the prompt, at least


def add_what_triton_lacks() -> None:
    """triton_kernels expects names of a later Triton than 3.6: a test for a GPU that this one is
    not, and the place of a kernel's source, which it copies to the kernels that it specialises."""
    target, jitted = triton.language.target_info, triton.runtime.jit.JITFunction
    if not hasattr(target, "is_hip_gfx1250"):

        @triton.constexpr_function
        def is_hip_gfx1250():
            return False

        target.is_hip_gfx1250 = is_hip_gfx1250
    if not hasattr(jitted, "def_file_line_number"):
        # What is assigned is dropped: the place of a kernel serves messages only.
        line = property(lambda kernel: kernel.starting_line_number, lambda kernel, value: None)
        column = property(lambda kernel: 0, lambda kernel, value: None)
        jitted.def_file_line_number, jitted.def_file_col_number = line, column


def import_kernels() -> ModuleType:
    """triton_kernels with the modules that a layer needs."""
    add_what_triton_lacks()
    for name in ("matmul", "numerics", "swiglu", "tensor", "tensor_details.layout", "topk"):
        importlib.import_module(f"triton_kernels.{name}")
    return sys.modules["triton_kernels"]


def import_model() -> ModuleType:
    """gpt_oss.triton.model, without its MoE, which imports modules that triton_kernels no longer
    has, and without its checkpoint reader, whose imports nothing here needs."""
    moe, checkpoints = ModuleType("gpt_oss.triton.moe"), ModuleType("gpt_oss.torch.weights")
    moe.moe = moe.quantize_mx4 = checkpoints.Checkpoint = None
    sys.modules |= {module.__name__: module for module in (moe, checkpoints)}
    return importlib.import_module("gpt_oss.triton.model")


def mxfp4(kernels, experts: int, rows: int, columns: int) -> tuple:
    """Random weights [experts, columns, rows] of a GEMM -> (values, precision with scales)."""
    shape = (experts, rows, columns // 2)  # two values a byte
    values = torch.randint(256, shape, dtype=torch.uint8, device=DEVICE)
    shape = (experts, rows, columns // 32)  # exponents of 2 plus 127: 2^-9 to 2^-4
    scales = torch.randint(118, 124, shape, dtype=torch.uint8, device=DEVICE)
    tensor, layout = kernels.tensor, kernels.tensor_details.layout
    values = tensor.wrap_torch_tensor(values.mT, tensor.FP4)
    values = tensor.convert_layout(values, layout.make_default_matmul_mxfp4_w_layout(-2))
    scales = tensor.wrap_torch_tensor(scales.mT)
    scales = tensor.convert_layout(scales, layout.make_default_matmul_mxfp4_w_scale_layout(-2))
    precision = kernels.matmul.PrecisionConfig(
        flex_ctx=kernels.matmul.FlexCtx(kernels.numerics.InFlexData()),
        b_mx_scale=scales, b_microblock_size=32, out_dtype=torch.bfloat16,
    )  # fmt: skip
    return values, precision


class MoE(nn.Module):
    """x [T, hidden_size], bf16 -> the same shape: router, two grouped GEMMs, weighted sum."""

    def __init__(self, kernels, c: weights.Config):
        super().__init__()
        E, H, I = c.num_local_experts, c.hidden_size, c.intermediate_size  # noqa: E741
        self.kernels, self.top_k = kernels, c.num_experts_per_tok
        self.gate_up, self.gate_up_precision = mxfp4(kernels, E, 2 * I, H)
        self.down, self.down_precision = mxfp4(kernels, E, H, I)
        self.gate_up_bias = torch.zeros(E, 2 * I, device=DEVICE)
        self.down_bias = torch.zeros(E, H, device=DEVICE)
        self.router = torch.randn(E, H, device=DEVICE).mul(H**-0.5).bfloat16()
        self.router_bias = torch.zeros(E, device=DEVICE, dtype=torch.bfloat16)
        swiglu, names = kernels.swiglu.swiglu_fn, ("alpha", "limit")
        swiglu = kernels.matmul.FnSpecs("swiglu", swiglu, names, reduction_n=2)
        self.swiglu = kernels.matmul.FusedActivation(swiglu, (1.702, c.swiglu_limit))

    def choose(self, x):
        return self.kernels.topk.topk(F.linear(x, self.router, self.router_bias), self.top_k)

    def forward(self, x):
        matmul, chosen = self.kernels.matmul.matmul, self.choose(x)
        order = chosen.mask_metadata.col_sorted_indx  # [T * top_k]: pairs, expert by expert
        counts, ragged = chosen.mask_metadata.col_sum, self.kernels.tensor
        groups = ragged.make_ragged_tensor_metadata(counts, len(order))
        hidden = matmul(
            x, self.gate_up, self.gate_up_bias, groups, gather_indx=order // self.top_k,
            precision_config=self.gate_up_precision, fused_activation=self.swiglu,
        )  # fmt: skip
        out = matmul(
            hidden, self.down, self.down_bias, groups, scatter_indx=order,
            precision_config=self.down_precision, gammas=chosen.vals.flatten()[order],
        )  # fmt: skip
        return out.view(len(x), self.top_k, -1).sum(1)  # [T, top_k, H] -> [T, H]


def transformer(kernels, openai: ModuleType, c: weights.Config) -> nn.Module:
    """OpenAI's model of these constants; where its MLPBlock stood, its norm and the layer above."""

    class MLPBlock(nn.Module):
        def __init__(self, config, layer_idx=0, device=None):
            super().__init__()
            self.norm, self.moe = openai.RMSNorm(c.hidden_size, device=device), MoE(kernels, c)

        def forward(self, x):  # [sequences, tokens, H]
            return x + self.moe(self.norm(x).flatten(0, 1)).view_as(x)

    openai.MLPBlock = MLPBlock
    # The defaults of its other constants are those of both sizes.
    config = openai.ModelConfig(
        num_hidden_layers=c.num_hidden_layers, num_experts=c.num_local_experts
    )
    model = openai.Transformer(config, device=DEVICE)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02)
    return model


def spread(times: list[float]) -> dict:
    return {"median": statistics.median(times), "lowest": min(times), "highest": max(times)}


def rounds_ms(call: Callable, reset: Callable) -> list[float]:
    """Milliseconds of each round: `call`, from its launch to its last kernel, after `reset`."""
    times = []
    for _ in range(WARM_UP + ROUNDS):
        reset()
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return times[WARM_UP:]


def graph_ms(call: Callable, reset: Callable = lambda: None) -> list[float]:
    """The same, of `call` as a CUDA graph."""
    for _ in range(WARM_UP):  # compiles
        reset()
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return rounds_ms(graph.replay, reset)


def add_row(rows: list[dict], row: dict, measure: Callable[[], dict]) -> None:
    """Says what was measured, or what failed, as soon as it is known."""
    try:
        row |= measure()
    except Exception as failure:  # the next row may still work
        message = str(failure).strip() or "no message"
        row["failed"] = f"{type(failure).__name__}: {message.splitlines()[0][:200]}"
    rows.append(row)
    print(json.dumps(row), file=sys.stderr, flush=True)


def time_layers(kernels, size: str, tokens: list[int], bandwidth: float, rows: list) -> None:
    """Adds a row for each number of tokens, in microseconds. The floor is the bytes of the active
    experts' weights at the bandwidth of a copy."""
    c = weights.published(size)
    layers = [MoE(kernels, c) for _ in range(CALLS)]
    expert_bytes = 3 * c.hidden_size * c.intermediate_size * 17 / 32  # 4 bits, a scale byte per 32

    def measure(T: int) -> dict:
        shape = (CALLS, T, c.hidden_size)
        inputs = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)
        pairs = list(zip(layers, inputs, strict=True))
        times = graph_ms(lambda: [layer(x) for layer, x in pairs])
        active = statistics.mean(len(layer.choose(x).indx.unique()) for layer, x in pairs)
        row = spread([1e3 * ms / CALLS for ms in times])
        floor = 1e6 * active * expert_bytes / bandwidth
        return row | {"active": active, "floor": floor, "share": floor / row["median"]}

    for T in tokens:
        add_row(rows, {"model": size, "tokens": T}, lambda T=T: measure(T))


def time_model(kernels, openai, size: str, concurrency: list[int], length: int, rows: list) -> None:
    """Adds a row for each number of sequences of `length` tokens, and one for prefill, in ms."""
    c = weights.published(size)
    model = transformer(kernels, openai, c)
    room = triton.next_power_of_2(length + NEW_TOKENS)

    def tokens(*shape):
        return torch.randint(c.vocab_size, shape, device=DEVICE, dtype=torch.int32)

    def made_caches(sequences: int, cached: int):
        """-> caches of every layer, and what makes them hold `cached` tokens again."""
        heads, made = c.num_key_value_heads, []
        for _ in range(c.num_hidden_layers):
            made.append(openai.Cache(sequences, room, heads, c.head_dim, device=DEVICE))
            made[-1].k.normal_()
            made[-1].v.normal_()
        return made, lambda: [cache.offset.fill_(cached) for cache in made]

    def step(S: int) -> dict:
        new, (caches, reset) = tokens(S, 1), made_caches(S, length)
        return spread(graph_ms(lambda: model(new, caches), reset))

    def prefill() -> dict:
        prompt, (caches, reset) = tokens(1, length), made_caches(1, 0)
        return spread(rounds_ms(lambda: model(prompt, caches), reset))

    for S in concurrency:
        row = {"model": size, "operation": "step", "concurrency": S, "room": room}
        add_row(rows, row, lambda S=S: step(S))
    row = {"model": size, "operation": f"prefill of {length}", "concurrency": 1, "room": room}
    add_row(rows, row, prefill)


LAYER_COLUMNS = [
    ("MoE layer of", "model", ""), ("tokens", "tokens", "d"), ("us, median", "median", ".1f"),
    ("lowest round", "lowest", ".1f"), ("highest", "highest", ".1f"),
    ("active experts", "active", ".1f"), ("floor us", "floor", ".1f"),
    ("floor / median", "share", ".0%"), ("failed", "failed", ""),
]  # fmt: skip
MODEL_COLUMNS = [
    ("model", "model", ""), ("operation", "operation", ""), ("sequences", "concurrency", "d"),
    ("room in the cache", "room", "d"), ("ms, median", "median", ".3f"),
    ("lowest round", "lowest", ".3f"), ("highest", "highest", ".3f"), ("failed", "failed", ""),
]  # fmt: skip


def numbers(text: str) -> list[int]:
    return [bench.positive(part) for part in text.split(",")]


def prompt_length(text: str) -> int:
    """OpenAI's attention compares itself with the equations, and can refuse, below 64 tokens."""
    if bench.positive(text) < 64:
        raise argparse.ArgumentTypeError(f"{text} is less than 64 tokens")
    return int(text)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--model", action="append", choices=bench.SIZES, help="may be repeated; default: both")
    add("--tokens", type=numbers, default=[1, 8, 64, 512, 8192], metavar="N,..", help="of a layer")
    add("--concurrency", type=numbers, default=[1, 8], metavar="N,..", help="sequences of a step")
    add("--input", type=prompt_length, default=512, metavar="N", help="tokens before a step")
    add("--json", action="store_true", help="print JSON instead of tables")
    args = parser.parse_args(argv)
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        print(f"peer_gpu: without {', '.join(missing)}: {INSTALL}", file=sys.stderr)
        return 1
    if not torch.cuda.is_available():
        print("peer_gpu: PyTorch finds no CUDA GPU, and this times nothing else", file=sys.stderr)
        return 1
    kernels, openai = import_kernels(), import_model()
    layers, models, bandwidth = [], [], bench.copy_bandwidth(DEVICE)
    with torch.inference_mode():
        for size in args.model or bench.SIZES:
            try:
                time_layers(kernels, size, args.tokens, bandwidth, layers)
                free()
                time_model(kernels, openai, size, args.concurrency, args.input, models)
            except torch.OutOfMemoryError:
                models.append({"model": size, "failed": "its weights do not fit the GPU"})
            free()
    device = bench.device_name(DEVICE)
    if args.json:
        what = {"device": device, "torch": torch.__version__, "triton": triton.__version__}
        rows = {"layers": layers, "models": models}
        print(json.dumps(what | {"settings": vars(args), "bandwidth": bandwidth} | rows))
    else:
        print(f"{device}, torch {torch.__version__}, triton {triton.__version__}\n")
        print(bench.table(LAYER_COLUMNS, layers), bench.table(MODEL_COLUMNS, models), sep="\n\n")
        print(f"\nA large copy reads and writes {bandwidth / 1e9:.1f} GB/s.")
    return int(any("failed" in row for row in layers + models))


def free() -> None:
    """Gives a model's memory back before the next one is made: 120b fits an 80 GB GPU once."""
    gc.collect()
    torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
