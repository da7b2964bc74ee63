"""Tests of tensor parallelism on CPUs: shards against the whole, ranks that meet through gloo
against one rank, and torchrun."""

import functools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import traceback
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from common import CONVERT, ROOT, hf_config, make, moe_case, prompt_of, relative

import gptoss
import weights
from gptoss import GPTOSS, Ranks
from weights import Shard

# Five groups of 32 and an odd vocabulary, which neither two nor four ranks divide.
FOUR = dict(num_attention_heads=8, num_key_value_heads=4)


def on_ranks(ranks: int, folder, work) -> list:
    """What `work(Ranks)` gives on each of several forked processes, which meet through a file."""
    context, done = multiprocessing.get_context("fork"), []
    results = context.SimpleQueue()
    file = str(folder / f"{work.__name__} {ranks}")

    def one(rank: int) -> None:
        torch.set_num_threads(1)
        try:
            store = dist.FileStore(file, ranks)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
            results.put((rank, work(Ranks(Shard(rank, ranks), store)), None))
            dist.barrier()
        except Exception:
            results.put((rank, None, traceback.format_exc()))
        os._exit(0)

    processes = [context.Process(target=one, args=(rank,)) for rank in range(ranks)]
    for process in processes:
        process.start()
    try:
        for _ in processes:
            done.append(results.get())
            assert done[-1][2] is None, done[-1][2]
    finally:
        for process in processes:
            process.join(None if len(done) == ranks and not done[-1][2] else 0)
            process.kill()
    return [result for _, result, _ in sorted(done)]


# --------------------------------------------------------------------------------------------------
# Shards


def check_parts(whole: weights.Checkpoint, parts: list[weights.Checkpoint]) -> None:
    """The shards put together are the whole, bit by bit."""
    c, ranks = whole.config, len(parts)
    q, kv = (n * c.head_dim // ranks for n in (c.num_attention_heads, c.num_key_value_heads))

    def fused(pieces: list[torch.Tensor]) -> torch.Tensor:  # a shard has rows of q, of k and of v
        split = [piece.split([q, kv, kv]) for piece in pieces]
        return torch.cat([piece[n] for n in range(3) for piece in split])

    def biases(pieces: list[torch.Tensor]) -> torch.Tensor:  # rank 0's, as they are added up
        assert not any(piece.any() for piece in pieces[1:])
        return pieces[0]

    joins = dict(qkv_weight=fused, qkv_bias=fused, out_bias=biases, down_bias=biases)
    joins |= {name: torch.cat for name in ("unembedding", "sinks")}
    axes = dict(out_weight=1, gate_up_weight=1, gate_up_scale=1, gate_up_bias=1)
    axes |= dict(down_weight=2, down_scale=2)
    joins |= {name: functools.partial(torch.cat, dim=axis) for name, axis in axes.items()}
    triples = [(name, t, [part.dense[name] for part in parts]) for name, t in whole.dense.items()]
    for n, experts in enumerate(whole.experts):
        for name, t in vars(experts).items():
            triples.append((f"{n}.{name}", t, [getattr(part.experts[n], name) for part in parts]))
    for name, tensor, pieces in triples:
        if not isinstance(tensor, torch.Tensor):
            assert pieces == [tensor] * ranks, name
        elif join := joins.get(name.rpartition(".")[2]):
            assert torch.equal(join(pieces), tensor), name
        else:
            assert all(torch.equal(piece, tensor) for piece in pieces), name


@pytest.mark.parametrize("ranks, groups", [(2, [2, 3]), (4, [1, 1, 1, 2])])
@pytest.mark.parametrize("layout", CONVERT)
def test_shards_are_the_parts_of_the_whole(tmp_path, layout, ranks, groups):
    path = make(tmp_path, layout, shards=2, **FOUR)
    parts = [weights.load(path, Shard(rank, ranks)) for rank in range(ranks)]
    assert [part.config.intermediate_size for part in parts] == [32 * n for n in groups]
    check_parts(weights.load(path), parts)


def test_a_shard_is_views_of_the_files(tmp_path):
    """Of a memory-mapped file only what is touched is read."""
    experts = weights.load(make(tmp_path, **FOUR), Shard(1, 2)).experts[0]
    for name in ("gate_up_weight", "gate_up_scale", "gate_up_bias", "down_weight", "down_scale"):
        tensor = getattr(experts, name)
        assert tensor.untyped_storage().nbytes() > tensor.nbytes, name


@pytest.mark.parametrize("layout", CONVERT)
def test_made_up_shards_are_the_parts_of_the_whole(layout):
    """And of the whole nothing stays in memory."""
    config = weights.Config.from_dict(hf_config(**FOUR))
    parts = [weights.random(config, layout, shard=Shard(rank, 2)) for rank in range(2)]
    check_parts(weights.random(config, layout), parts)
    for held in (parts[1].dense, *map(vars, parts[1].experts)):
        for name, t in held.items():
            if isinstance(t, torch.Tensor):
                assert t.untyped_storage().nbytes() == t.nbytes, name


@pytest.mark.parametrize("ranks, groups", [
    (1, [90]),
    (2, [45, 45]),
    (4, [22, 23, 22, 23]),
    (8, [11, 11, 11, 12, 11, 11, 11, 12]),
])  # fmt: skip
def test_the_groups_of_the_real_models(ranks, groups):
    """Of 120b's 90 groups of 32, and the shapes that follow."""
    kinds = weights.LAYER_TYPES[:1]
    whole = replace(weights.published("120b"), num_hidden_layers=1, layer_types=kinds)
    shards = [
        weights.random(whole, "openai", "meta", shard=Shard(rank, ranks)) for rank in range(ranks)
    ]
    assert [shard.config.intermediate_size for shard in shards] == [32 * n for n in groups]
    for shard, n in zip(shards, groups, strict=True):
        assert shard.dense["unembedding"].shape == (201088 // ranks, 2880)
        assert shard.dense["0.qkv_weight"].shape == (80 * 64 // ranks, 2880)
        assert shard.dense["0.out_weight"].shape == (2880, 64 * 64 // ranks)
        experts = shard.experts[0]
        assert experts.gate_up_weight.shape == (128, 64 * n, 1440)
        assert experts.down_weight.shape == (128, 2880, 16 * n)
        assert experts.down_scale.shape == (128, 2880, n)


@pytest.mark.parametrize("changes, ranks, message", [
    (dict(), 3, "3 ranks cannot share a model of 4 key/value heads and 5 groups of 32 "
     "intermediate values; [1, 2, 4] can"),
    (dict(intermediate_size=64), 4, "4 ranks cannot share a model of 4 key/value heads and 2 "
     "groups of 32 intermediate values; [1, 2] can"),
])  # fmt: skip
def test_ranks_that_cannot_share_a_model(tmp_path, changes, ranks, message):
    with pytest.raises(weights.CheckpointError) as error:
        weights.load(make(tmp_path, **FOUR | changes), Shard(0, ranks))
    assert str(error.value) == message


def test_a_shard_needs_its_ranks(tmp_path):
    shard = weights.load(make(tmp_path, **FOUR), Shard(0, 2))
    with pytest.raises(ValueError, match="ranks=Shard.rank=0, ranks=1.*Shard.rank=0, ranks=2"):
        GPTOSS(shard)


@pytest.mark.parametrize("activations", ["bf16", "mxfp8", "mxfp4", "fp8"])
def test_the_layers_of_the_shards_sum_to_the_whole(activations):
    """The groups of 32 that share a scale are whole, so activations are rounded as one rank rounds
    them; what is left is the order of float32 sums."""
    config = weights.Config.from_dict(hf_config(**FOUR))
    x, router_weight, router_bias, _ = moe_case()

    def layer(shard: Shard) -> torch.Tensor:
        experts = weights.random(config, "quark", shard=shard).experts[0]
        return gptoss.moe_reference(x, router_weight, router_bias, experts, 3, activations)

    whole = layer(weights.WHOLE)
    assert relative(sum(layer(Shard(rank, 4)) for rank in range(4)), whole) < 1e-6


# --------------------------------------------------------------------------------------------------
# Ranks


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_give_one_ranks_logits_and_tokens(tmp_path, ranks):
    """In every layout. Greedy tokens are equal though logits are not quite: the two largest are
    far apart beside what another order of float32 sums moves them."""
    paths = [
        make(tmp_path / layout, layout, seed=3, num_hidden_layers=2, **FOUR) for layout in CONVERT
    ]
    prompts = [prompt_of(n, seed=n) for n in (1, 17, 40)]

    def results(ranks: Ranks | None = None) -> list:
        models = [GPTOSS.from_pretrained(path, activations="bf16", ranks=ranks) for path in paths]
        found = [
            (m.logits(prompts[2]).tolist(), m.generate(prompts, 6, max_batch=2)) for m in models
        ]
        options = dict(temperature=1.0, top_p=0.9, seed=5)
        return [*found, (found[0][0], models[0].generate(prompts, 6, **options))]

    expected = results()
    for found in on_ranks(ranks, tmp_path, results):
        for (logits, tokens), (want, same) in zip(found, expected, strict=True):
            assert relative(torch.tensor(logits), torch.tensor(want)) < 1e-5
            assert tokens == same


@pytest.mark.parametrize("activations", ["fp8", "mxfp8", "mxfp4"])
def test_ranks_with_quantised_activations(tmp_path, activations):
    path = make(tmp_path, "quark", seed=3, **FOUR)

    def logits(r: Ranks | None) -> list:
        return GPTOSS.from_pretrained(path, activations=activations, ranks=r).logits(prompt_of(30))

    found = on_ranks(2, tmp_path, lambda r: logits(r).tolist())
    assert found[0] == found[1]
    # another order of sums tips a rounding of the activations here and there
    assert relative(torch.tensor(found[0]), logits(None)) < 2e-2


def test_bfloat16_on_ranks_is_near_float32(tmp_path):
    path = make(tmp_path, num_hidden_layers=2, **FOUR)

    def logits(r: Ranks) -> list:
        return GPTOSS.from_pretrained(path, "cpu", torch.bfloat16, ranks=r).logits(prompt_of(30))

    found = on_ranks(2, tmp_path, lambda r: logits(r).tolist())
    assert found[0] == found[1]
    want = GPTOSS.from_pretrained(path).logits(prompt_of(30))
    assert relative(torch.tensor(found[0]), want) < 0.1  # as one rank's


def test_what_ranks_agree_on(tmp_path):
    """Tokens without a seed, the pages that fit, what the first reads."""
    path = make(tmp_path, **FOUR)

    def agreed(r: Ranks) -> tuple:
        model = GPTOSS.from_pretrained(path, ranks=r)
        tokens = model.generate([prompt_of(5), prompt_of(9)], 20, temperature=1.0)
        said = [r.first(lambda n=n: [f"\udcff {r.shard.rank}", n]) for n in range(2)]
        return tokens, said, r.least(7 + r.shard.rank), model.pages_that_fit(16)

    first, *others = on_ranks(4, tmp_path, agreed)
    assert all(other == first for other in others)
    assert first[1:3] == ([["\udcff 0", 0], ["\udcff 0", 1]], 7)


def test_a_cache_is_its_heads_share(tmp_path):
    path = make(tmp_path, **FOUR)
    part = GPTOSS(weights.load(path, Shard(1, 4)), ranks=Ranks(Shard(1, 4)))
    cache = gptoss.KVCache(part.config, 3, 16, "cpu", torch.float32)
    assert cache.pool.shape == (2, 64, 2, 1, 20)


# --------------------------------------------------------------------------------------------------
# On GPUs: torchrun --nproc-per-node 2 -m pytest tests/test_ranks.py -k gpus

on_gpus = pytest.mark.skipif(
    "TORCHELASTIC_RUN_ID" not in os.environ or torch.cuda.device_count() < 2,
    reason="needs several GPUs, and torchrun",
)


@on_gpus
@pytest.mark.parametrize("rows", [1, 8, 64, 512])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gpus_sum(tmp_path, rows, dtype):
    """A graph of many sums one after another, whose whole numbers are exact in either format."""
    ranks = GPTOSS.from_pretrained(make(tmp_path, **FOUR), "cuda").ranks
    generators = [torch.Generator().manual_seed(n) for n in range(ranks.shard.ranks)]
    draw = functools.partial(torch.randint, -9, 10, (50, rows, 2880))
    parts = [draw(generator=generator).to(dtype) for generator in generators]
    mine, want = parts[ranks.shard.rank].cuda(), sum(parts).cuda()
    ranks.total(mine[0].clone())  # makes what a graph cannot
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        found = torch.stack([ranks.total(part.clone()) for part in mine])
    for _ in range(20):
        found.zero_()
        graph.replay()
        assert torch.equal(found, want)


@on_gpus
@pytest.mark.parametrize("rows", [1, 8, 64])
def test_gpus_sum_and_norm(tmp_path, rows):
    """A graph of many, whose calls meet no other launch: a rank that is ahead must not overwrite
    what another has not read."""
    import ops_triton

    ranks, dtype = GPTOSS.from_pretrained(make(tmp_path, **FOUR), "cuda").ranks, torch.bfloat16
    peers = ops_triton.meet(*ranks.shard, rows, 2880, torch.device("cuda"))
    generators = [torch.Generator().manual_seed(n) for n in range(ranks.shard.ranks)]
    draw = functools.partial(torch.randint, -9, 10, (50, rows, 2880))
    parts = [draw(generator=generator).to(dtype) for generator in generators]
    mine, want = parts[ranks.shard.rank].cuda(), sum(parts).cuda()
    x, scale = torch.zeros_like(mine[0]), torch.ones(2880, device="cuda")
    ops_triton.sum_norm(x, mine[0], scale, 1e-5, peers)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        found = [ops_triton.sum_norm(x, part, scale, 1e-5, peers) for part in mine]
    norms = torch.stack([gptoss.add_norm(whole, None, scale, 1e-5)[1] for whole in want])
    for _ in range(200):
        graph.replay()
        assert torch.equal(torch.stack([total for total, _ in found]), want)
    assert relative(torch.stack([norm for _, norm in found]), norms) < 2**-8


@on_gpus
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpus_give_one_ranks_logits_and_tokens(tmp_path, dtype):
    path, prompts = make(tmp_path, seed=3, **FOUR), [prompt_of(n, seed=n) for n in (1, 5, 17, 40)]
    one, gpus = GPTOSS.from_pretrained(path), GPTOSS.from_pretrained(path, "cuda", dtype)
    found, want = gpus.logits(prompts[3]).cpu(), one.logits(prompts[3])
    assert relative(found, want) < (1e-4 if dtype == torch.float32 else 0.15)
    if dtype == torch.float32:  # a graph's
        assert gpus.generate(prompts, 16) == one.generate(prompts, 16)
    options = dict(temperature=1.0, top_p=0.9)
    drawn = torch.tensor(gpus.generate(prompts, 16, stop_tokens=(), **options)).cuda()
    others = drawn.clone()
    dist.broadcast(others, 0)
    assert torch.equal(drawn, others)


# --------------------------------------------------------------------------------------------------
# Under torchrun


def torchrun(*args: str, ranks: int = 2, **options) -> subprocess.Popen:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
        *args,
    ]
    pipe = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, text=True, env=environment, **pipe, **options)


def said(err: str, program: str = "gptoss") -> list[str]:
    return [line for line in err.splitlines() if line.startswith(f"{program}: ")]


def test_torchrun_answers_once():
    process = torchrun("gptoss.py", "--prompt", "-", "--prompt", "Who are you?")
    out, err = process.communicate("What is 17 + 25?\n", timeout=120)
    assert process.returncode == 0, err
    assert out.splitlines()[0] == "[0] 17 + 25 = 42" and out.count("[1] I am") == 1
    assert err.count(" tokens | TTFT ") == 1


def test_a_wrong_launch_is_one_line():
    process = torchrun("gptoss.py", "--prompt", "hi", ranks=3)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1 and out == ""
    [line] = said(err)
    assert line.startswith("gptoss: 3 ranks cannot share a model of 2 key/value heads and 5 ")


def test_other_ranks_are_silent():
    """Of what is wrong before they meet, the command line say, rank 0 speaks."""
    launch = os.environ | dict(WORLD_SIZE="2", RANK="1")
    command = [sys.executable, "gptoss.py", "--bad"]
    other = subprocess.run(command, cwd=ROOT, env=launch, capture_output=True, text=True)
    assert (other.returncode, other.stdout, other.stderr) == (2, "", "")


def test_ranks_are_started_by_torchrun(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE is 2: ranks are started by torchrun only"):
        Ranks.join("cpu")


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_each_rank_takes_a_gpu(monkeypatch, device):
    launch = dict(WORLD_SIZE="64", LOCAL_WORLD_SIZE="64", TORCHELASTIC_RUN_ID="1")
    for name, value in launch.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"^device='{device}': each of 64 ranks takes a GPU of "):
        Ranks.join(device)


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="finds the ranks in Linux's /proc")
def test_a_rank_that_dies_ends_all():
    """torchrun's report names it. Another rank may lose its connection to it before torchrun ends
    that one too, and then says so in a line of its own."""
    long = ["--prompt", "1 1 1 1", "--raw", "--max-new-tokens", "6000"]
    process = torchrun("gptoss.py", *long, start_new_session=True)
    try:
        assert process.stdout.read(1)  # both generate
        children = f"/proc/{process.pid}/task/{process.pid}/children"
        with open(children) as file:
            ranks = [int(pid) for pid in file.read().split()]
        os.kill(ranks[1], signal.SIGKILL)
        err = process.communicate(timeout=60)[1]
        assert process.returncode == 1 and not any(os.path.exists(f"/proc/{pid}") for pid in ranks)
        assert f"Signal 9 (SIGKILL) received by PID {ranks[1]}" in err
        assert said(err) in ([], ["gptoss: another rank ended, see torchrun's report"]), err
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def test_a_rank_that_fails_says_why(tmp_path):
    """Though it is not the first, and no other speaks."""
    script = tmp_path / "script.py"
    script.write_text(f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import gptoss
def accept(engine, sequences, tokens):
    raise RuntimeError("no memory is left" + chr(10) + "for this")
if os.environ["RANK"] == "1":
    gptoss.Engine.accept = accept
sys.exit(gptoss.main())
""")
    process = torchrun(str(script), "--prompt", "1 1 1 1", "--raw", "--max-new-tokens", "6000")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1 and said(err) == ["gptoss: no memory is left"], err


@pytest.mark.slow
def test_bench_reports_once():
    few = ["--rounds", "1", "--input", "9", "--output", "4", "--concurrency", "2", "--json"]
    process = torchrun("bench.py", "--checkpoint", "random:tiny", *few)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    result = json.loads(out)
    assert result["ranks"] == 2 and len(result["rows"]) == 1 and result["rows"][0]["tpot"] > 0
