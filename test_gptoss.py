"""Tests of the engine: `python -m pytest`. The oracle is Hugging Face transformers' own GPT-OSS, in
float32.

One random model is written in every published layout; its numbers are exact in bf16 and mxfp4, so
that all layouts and the oracle hold the same weights. Where a test compares float32 results, 1e-4
relative is what the issue of summation order leaves: about 1e-6 a GEMM, through a few layers and a
softmax."""

import datetime
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref

import pytest
import torch
from common import (
    CONVERT,
    ROOT,
    TINY,
    hf_config,
    make,
    oracle,
    oracle_greedy,
    prompt_of,
    random_tensors,
    relative,
    write,
)

import gptoss
import weights
from gptoss import GPTOSS

torch.set_num_threads(1)  # these models are too small to share

ODD = [
    dict(),
    dict(num_local_experts=9, num_experts_per_tok=4, sliding_window=1, head_dim=34),
    dict(
        num_hidden_layers=1,
        num_attention_heads=3,
        num_key_value_heads=3,
        vocab_size=131,
        intermediate_size=32,
    ),
    dict(
        num_hidden_layers=4,
        num_key_value_heads=1,
        sliding_window=30,
        hidden_size=32,
        num_experts_per_tok=1,
    ),
]


@pytest.mark.parametrize("seed, changes", list(enumerate(ODD)))
def test_logits_equal_transformers(tmp_path, seed, changes):
    config = hf_config(**changes)
    tensors = random_tensors(config, seed)
    tokens = prompt_of(90, config["vocab_size"], seed)
    with torch.no_grad():
        expected = oracle(config, tensors)(torch.tensor([tokens])).logits[0]
    found = GPTOSS.from_pretrained(write(tmp_path, config, tensors)).logits(tokens)
    assert found.shape == (90, config["vocab_size"]) and found.dtype == torch.float32
    assert relative(found, expected) < 1e-4


def test_every_layout_gives_identical_logits(tmp_path, monkeypatch):
    tokens = prompt_of(40)
    paths = {
        layout: make(tmp_path / layout, layout, shards=1 + 2 * (layout != "openai"))
        for layout in CONVERT
    }
    logits = {}
    for layout, path in paths.items():
        model = GPTOSS.from_pretrained(path, activations="bf16")
        assert model.layout == layout
        logits[layout] = model.logits(tokens)
        assert torch.equal(logits[layout], logits["hf-mxfp4"])
    monkeypatch.setattr(gptoss, "EXPAND_BELOW", 0)  # as for the real models: experts stay packed
    packed = {
        layout: GPTOSS.from_pretrained(path, activations="bf16") for layout, path in paths.items()
    }
    assert all(
        packed[layout].layers[0].packed.gate_up_weight.dtype == torch.uint8
        for layout in packed
        if layout != "hf-bf16"
    )
    for layout, model in packed.items():
        assert relative(model.logits(tokens), logits["hf-mxfp4"]) < 1e-5
        if layout != "hf-bf16":
            assert torch.equal(model.logits(tokens), packed["hf-mxfp4"].logits(tokens))


def test_greedy_equals_transformers_alone_and_batched(tmp_path):
    """Tokens are equal though logits are not: in float32 a GEMM of another number of rows moves
    these logits by about 1e-5, and the two largest are never nearer than 1e-2 here."""
    config = hf_config()
    tensors = random_tensors(config, 1)
    reference, model = (
        oracle(config, tensors),
        GPTOSS.from_pretrained(write(tmp_path, config, tensors)),
    )
    prompts = [prompt_of(n, seed=n) for n in (1, 5, 17, 40, 33, 8)]
    expected = [oracle_greedy(reference, p, 24) for p in prompts]
    assert [model.generate([p], 24)[0] for p in prompts] == expected
    for max_batch in (1, 4, 64):
        assert model.generate(prompts, 24, max_batch=max_batch) == expected
    stop = expected[2][10]  # a stop token ends a prompt before it and stays out
    cut = [e[: e.index(stop)] if stop in e else e for e in expected]
    assert model.generate(prompts, 24, stop_tokens=[stop]) == cut


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("chunk", [3, 1024])
def test_paged_and_chunked_equals_dense(tmp_path, monkeypatch, page_size, chunk):
    config = hf_config()
    tensors, tokens = random_tensors(config, 2), prompt_of(70)
    reference, model = (
        oracle(config, tensors),
        GPTOSS.from_pretrained(write(tmp_path, config, tensors)),
    )
    monkeypatch.setattr(gptoss, "PAGE_SIZE", page_size)
    monkeypatch.setattr(gptoss, "PREFILL_TOKENS", chunk)
    with torch.no_grad():
        assert relative(model.logits(tokens), reference(torch.tensor([tokens])).logits[0]) < 1e-4
    expected = oracle_greedy(reference, tokens, 40)
    assert model.generate([tokens, tokens[:9]], 40, page_size=page_size)[0] == expected


def test_attention_scores_stay_bounded(tmp_path, monkeypatch):
    model, tokens = GPTOSS.from_pretrained(make(tmp_path)), prompt_of(300)
    expected = model.logits(tokens)
    monkeypatch.setattr(gptoss, "SCORES", 1 << 14)
    sizes, attend = [], gptoss.attend

    def watched(q, past, new, sinks, hidden):
        sizes.append(q.shape[0] * q.shape[2] * hidden.shape[3] * hidden.shape[4])
        return attend(q, past, new, sinks, hidden)

    monkeypatch.setattr(gptoss, "attend", watched)
    # The same sums, though a GEMM of fewer rows may add them in another order.
    assert relative(model.logits(tokens), expected) < 1e-5
    assert len(sizes) > 10 and max(sizes) <= 1 << 14


def test_of_a_prefill_only_the_last_row_survives(tmp_path, monkeypatch):
    """One chunk's hidden states at a time, whatever the length of the prompt."""
    model = GPTOSS.from_pretrained(make(tmp_path))
    monkeypatch.setattr(gptoss, "PREFILL_TOKENS", 8)
    alive, most, forward = weakref.WeakSet(), [], model.forward

    def watched(*args):
        hidden = forward(*args)
        alive.add(hidden)
        most.append(len(alive))
        return hidden

    monkeypatch.setattr(model, "forward", watched)
    engine = model.engine([prompt_of(200)], 1)
    while engine.unfinished():
        engine.step()
    assert len(most) == 25 and max(most) <= 2  # the one before is released when the next is there


def test_prompts_are_prefilled_between_decode_steps(tmp_path, monkeypatch):
    """A long prompt holds up a running one for a chunk at a time, and both get their tokens."""
    model, long = GPTOSS.from_pretrained(make(tmp_path)), prompt_of(100)
    alone = [model.generate([prompt], 30, stop_tokens=())[0] for prompt in (long[:5], long)]
    monkeypatch.setattr(gptoss, "PREFILL_TOKENS", 10)
    engine = model.engine([long[:5]], 30, stop_tokens=(), num_pages=100, max_batch=2)
    new, gave = [[], []], []
    engine.submit(long, 30)
    while engine.unfinished():
        given = engine.step()
        gave.append([index for index, _ in given])
        for index, token in given:
            new[index].append(token)
    assert new == alone
    # Both in chunks of 5, of which the first prompt is one; then chunks of 10 between its tokens.
    assert gave[:20] == [[0], [0], [], [0], [], [0], [], [0], [], [0], [], [0], [], [0], [], [0],
                         [], [0], [], [0]]  # fmt: skip
    assert gave[20:22] == [[1], [0, 1]] and sorted(engine.cache.free) == list(range(1, 101))


def test_a_prompt_is_kept_where_it_runs_alone(tmp_path):
    model = GPTOSS.from_pretrained(make(tmp_path))
    engine = model.engine([], 1, num_pages=20, max_batch=2)
    with pytest.raises(ValueError, match="keep=True needs max_batch=1, this engine has 2"):
        engine.submit(prompt_of(5), 1, keep=True)


def test_bfloat16_is_near_float32(tmp_path):
    path, tokens = make(tmp_path, num_hidden_layers=2), prompt_of(60)
    low = GPTOSS.from_pretrained(path, dtype=torch.bfloat16).logits(tokens)
    # about ten roundings of 2^-9 in each layer, in quadrature, and experts that near-ties of the
    # router swap
    assert relative(low, GPTOSS.from_pretrained(path).logits(tokens)) < 0.1


def test_window_pages_are_bounded_far_past_the_window(tmp_path, monkeypatch):
    model = GPTOSS.from_pretrained(make(tmp_path))  # window 7
    for page_size in (1, 3, 16):
        tables = []
        allocate = gptoss.KVCache.allocate
        monkeypatch.setattr(
            gptoss.KVCache, "allocate", lambda *a, f=allocate, t=tables: t.append(f(*a)) or t[-1]
        )
        engine = model.engine([prompt_of(5)], 200, page_size=page_size)
        assert len(list(engine.tokens())) == 200
        bound, full = -(-7 // page_size) + 1, -(-205 // page_size)
        assert len(tables) == 1 and len(tables[0]["sliding_attention"]) <= bound
        assert len(tables[0]["full_attention"]) == full
        assert engine.cache.peak <= full + bound
        monkeypatch.undo()


def test_prompts_wait_for_pages_and_free_them(tmp_path):
    model = GPTOSS.from_pretrained(make(tmp_path))
    prompts = [prompt_of(n, seed=n) for n in (30, 3, 22, 9, 14)]
    alone = [model.generate([p], 12, page_size=4)[0] for p in prompts]
    needed = sum(gptoss.pages_needed(model.config, 42, 4).values())
    for num_pages, max_batch in ((needed, 64), (needed + 3, 64), (None, 64), (1000, 2), (None, 2)):
        engine = model.engine(prompts, 12, page_size=4, num_pages=num_pages, max_batch=max_batch)
        found = [[] for _ in prompts]
        for index, token in engine.tokens():
            found[index].append(token)
        cache = engine.cache
        assert found == alone and cache.peak <= cache.num_pages
        assert sorted(cache.free) == list(range(1, cache.num_pages + 1))
    model.forward = None  # nothing may run
    with pytest.raises(
        ValueError, match=f"prompt 0 needs {needed} pages .* the pool has {needed - 1}"
    ):
        model.stream(prompts, 12, page_size=4, num_pages=needed - 1)


def test_max_batch_bounds_what_decodes_together(tmp_path, monkeypatch):
    model, together = GPTOSS.from_pretrained(make(tmp_path)), []
    forward = model.forward

    def watched(tokens, step, pool):
        together.append(len(step.positions))
        return forward(tokens, step, pool)

    monkeypatch.setattr(model, "forward", watched)
    model.generate([prompt_of(4)] * 5, 6, num_pages=1000, max_batch=2)
    assert max(together) == 2


def test_the_checkpoints_own_stop_tokens_end_a_prompt(tmp_path):
    model = GPTOSS.from_pretrained(make(tmp_path))
    whole = model.generate([prompt_of(5)], 30)[0]
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"eos_token_id": whole[9]}))
    model = GPTOSS.from_pretrained(tmp_path)
    assert model.generate([prompt_of(5)], 30) == [whole[: whole.index(whole[9])]]
    assert model.generate([prompt_of(5)], 30, stop_tokens=()) == [whole]


def test_streams_interleave_and_match_generate(tmp_path):
    model = GPTOSS.from_pretrained(make(tmp_path))
    prompts = [prompt_of(4), prompt_of(6, seed=1)]
    events = list(model.stream(prompts, 5))
    assert [index for index, _ in events[:6]] == [0, 1, 0, 1, 0, 1]
    assert [[t for i, t in events if i == index] for index in (0, 1)] == model.generate(prompts, 5)
    assert model.generate(prompts, 0) == [[], []] and model.generate([], 5) == []


def test_sampling_follows_the_distribution():
    logits = torch.tensor([[1.0, 3.0, 2.0, -1.0, 2.5]])
    n = 100_000
    # a grid: counts are n times the shares, to a step and float32's 1e-7 n
    draws = (torch.arange(n).double() + 0.5) / n
    for temperature, top_k, top_p, kept in (
        (1.0, None, None, [0, 1, 2, 3, 4]),
        (0.5, None, None, [0, 1, 2, 3, 4]),
        (1.0, 2, None, [1, 4]),
        (1.0, None, 0.6, [1, 4]),
        (1.0, None, 1e-6, [1]),
        (2.0, 3, 0.9, [1, 4, 2]),
        (1.0, 99, 1.0, [0, 1, 2, 3, 4]),
    ):
        share = (logits[0].double() / temperature).softmax(-1)
        expected = torch.zeros(5, dtype=torch.double)
        expected[kept] = share[kept] / share[kept].sum()
        tokens = gptoss.sample(
            logits.expand(n, 5), draws, gptoss.Sampling(temperature, top_k, top_p)
        )
        assert (torch.bincount(tokens, minlength=5) - n * expected).abs().max() <= 2
    assert gptoss.sample(logits, draws[:1], gptoss.Sampling()).tolist() == [1]


def test_generations_may_interleave(tmp_path):
    model = GPTOSS.from_pretrained(make(tmp_path))
    first, second = model.stream([prompt_of(9)], 20), model.stream([prompt_of(5, seed=1)], 20)
    pairs = [(a, b) for (_, a), (_, b) in zip(first, second, strict=True)]
    assert [a for a, _ in pairs] == model.generate([prompt_of(9)], 20)[0]
    assert [b for _, b in pairs] == model.generate([prompt_of(5, seed=1)], 20, 0.0)[0]


def test_same_seed_same_tokens_in_any_batch(tmp_path):
    """As in the test of places in the batch, no draw is nearer than 4e-5 to the edge of a token's
    share, which a batch of another size moves by about 1e-6."""
    model = GPTOSS.from_pretrained(make(tmp_path))
    prompts = [prompt_of(4), prompt_of(6, seed=1), prompt_of(9, seed=2)]
    options = dict(temperature=1.5, top_k=50, top_p=0.95)
    first = model.generate(prompts, 30, seed=7, **options)
    assert first == model.generate(prompts, 30, seed=7, max_batch=2, **options)
    assert first[0] == model.generate(prompts[:1], 30, seed=7, **options)[0]
    assert first != model.generate(prompts, 30, seed=8, **options)
    assert model.generate(prompts, 30, **options) != model.generate(prompts, 30, **options)


@pytest.mark.parametrize(
    "prompts, options, message",
    [
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1, 97]], {}, "token 97, outside the vocabulary of 97"),
        (
            [[1] * 500],
            dict(max_new_tokens=20),
            "prompt 0 is too long: 500 tokens and max_new_tokens=20 exceed .* 512",
        ),
        ([[1]], dict(temperature=-1.0), "temperature"),
        ([[1]], dict(top_p=0.0), "top_p"),
        ([[1]], dict(top_k=0), "top_k"),
        ([[1]], dict(page_size=0), "page_size"),
        ([[1]], dict(max_batch=0), "max_batch"),
        ([[1]], dict(max_new_tokens=-1), "max_new_tokens"),
        ([[1]], dict(num_pages=0), "the pool has 0"),
    ],
)
def test_bad_requests_are_named(tmp_path, prompts, options, message):
    model = GPTOSS.from_pretrained(make(tmp_path))
    with pytest.raises(ValueError, match=message):
        model.generate(prompts, **dict(max_new_tokens=3) | options)
    with pytest.raises(ValueError, match="empty"):
        model.logits([])


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(ops="fast"), "ops='fast'"),
        (dict(ops="gluon"), "ops='gluon' needs Triton with an active GPU"),
        (dict(activations="int8"), "activations='int8'"),
        (dict(activations="fp8"), "need the static input scales of a Quark checkpoint"),
    ],
)
def test_bad_model_arguments_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        GPTOSS.from_pretrained(make(tmp_path), **options)


def cli(*args: str, stdin: str = "") -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "gptoss.py"), *args],
        input=stdin,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def tiny():
    return GPTOSS.from_pretrained(TINY), weights.load_tokenizer(TINY)


QUESTIONS = [
    "What is 17 + 25?",
    "What is the capital of France?",
    "Sort 9, 2 and 5.",
    "Reverse the word cat.",
    "Who are you?",
    "What is 90 - 31?",
    "What is the capital of Japan?",
    "What is 38 + 45?",
]


def test_eight_prompts_at_once_equal_each_alone(tiny):
    model, tokenizer = tiny
    prompts = [
        gptoss.chat_tokens(tokenizer, [("user", q)], "2026-01-31", "medium") for q in QUESTIONS
    ]
    stop = [tokenizer.encode_single_token("<|return|>")]
    together = model.generate(prompts, 96, stop_tokens=stop)
    assert together == [model.generate([p], 96, stop_tokens=stop)[0] for p in prompts]
    answers = [
        tokenizer.decode(tokens).partition("<|channel|>final<|message|>")[2] for tokens in together
    ]
    assert (
        "42" in answers[0]
        and "Paris" in answers[1]
        and "2, 5, 9" in answers[2]
        and "tac" in answers[3]
    )
    assert "59" in answers[5] and "Tokyo" in answers[6] and "83" in answers[7]


needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is installed on Linux only"
)
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that PyTorch sees")


@on_gpu
@pytest.mark.parametrize(
    "layout, activations",
    [
        ("hf-mxfp4", "bf16"),
        ("openai", "mxfp8"),
        ("hf-mxfp4", "mxfp4"),
        ("quark", "fp8"),
        ("hf-bf16", "bf16"),
    ],
)
def test_a_gpu_gives_the_cpus_logits(tmp_path, layout, activations):
    path, tokens = make(tmp_path, layout), prompt_of(60)
    want = GPTOSS.from_pretrained(path, activations=activations).logits(tokens)
    found = (
        GPTOSS.from_pretrained(path, "cuda", torch.float32, activations=activations)
        .logits(tokens)
        .cpu()
    )
    # float32 sums in another order; where that tips a quantised activation, by a rounding of it
    assert relative(found, want) < (1e-4 if activations == "bf16" else 2e-2)


@on_gpu
def test_a_gpu_in_bfloat16_is_near_float32(tmp_path):
    path, tokens = make(tmp_path, num_hidden_layers=2), prompt_of(60)
    low = GPTOSS.from_pretrained(path, "cuda", torch.bfloat16).logits(tokens).cpu()
    assert relative(low, GPTOSS.from_pretrained(path).logits(tokens)) < 0.1  # as on a CPU, above


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_gives_the_cpus_tokens(tiny, dtype):
    model, tokenizer = tiny
    prompts = [
        gptoss.chat_tokens(tokenizer, [("user", q)], "2026-01-31", "medium") for q in QUESTIONS
    ]
    stop = [tokenizer.encode_single_token("<|return|>")]
    gpu = GPTOSS.from_pretrained(TINY, "cuda", dtype)
    assert gpu.generate(prompts, 96, stop_tokens=stop) == model.generate(
        prompts, 96, stop_tokens=stop
    )


@on_gpu
@pytest.mark.parametrize("options", [
    dict(),
    dict(temperature=1.0, seed=3),
    dict(temperature=0.8, top_k=20, top_p=0.9, seed=5),
], ids=["greedy", "sampled", "cut"])  # fmt: skip
def test_a_graph_gives_the_host_paths_tokens(tiny, options):
    """Prompts of different lengths that join and leave, by a stop token or the limit."""
    tokenizer = tiny[1]
    prompts = [gptoss.chat_tokens(tokenizer, [("user", q)], "2026-01-31", "low") for q in QUESTIONS]
    gpu = GPTOSS.from_pretrained(TINY, "cuda")

    def answers() -> list:
        return [gpu.generate(prompts, n, max_batch=b, **options) for n, b in ((60, 3), (17, 8))]

    captured = answers()
    assert answers() == captured
    gpu.ops = gpu.ops._replace(capturable=False)
    assert answers() == captured


@on_gpu
def test_the_padding_of_a_graph_meets_no_expert_of_its_own(tiny, monkeypatch):
    """Batches of more than 16 are filled up to a multiple of 16."""
    tokenizer = tiny[1]
    texts = [f"What is {n} + {n + 3}?" for n in range(11, 29)]
    prompts = [gptoss.chat_tokens(tokenizer, [("user", q)], "2026-01-31", "low") for q in texts]
    gpu, met = GPTOSS.from_pretrained(TINY, "cuda"), []
    answers = gpu.generate(prompts, 40)
    engine, ops = gpu.engine(prompts, 40), gpu.ops
    while len(engine.running) < len(prompts):
        engine.step()

    def moe(x, router_weight, router_bias, *rest):
        met.append(gptoss.gating(x, router_weight, router_bias, 4).chosen)
        return ops.moe(x, router_weight, router_bias, *rest)

    with torch.inference_mode():
        graph = gptoss.DecodeGraph.of(engine, engine.running)
        graph.load(engine.running)
        gpu.ops = ops._replace(moe=moe)
        graph.run()
    assert [len(chosen) for chosen in met] == [32] * len(gpu.layers)
    assert all(torch.equal(chosen[18:], chosen[:1].expand(14, -1)) for chosen in met)
    assert graph.tokens[18:].tolist() == graph.tokens[:1].tolist() * 14
    gpu.ops = ops._replace(capturable=False)
    assert gpu.generate(prompts, 40) == answers


@on_gpu
def test_nothing_is_compiled_after_warm_up(tiny):
    import triton

    import ops_triton

    gpu = GPTOSS.from_pretrained(TINY, "cuda")
    kernels = [f for f in vars(ops_triton).values() if isinstance(f, triton.JITFunction)]

    def compiled() -> int:
        return sum(len(cache[0]) for f in kernels for cache in f.device_caches.values())

    gpu.generate([prompt_of(40, 1000)] * 3, 20, stop_tokens=())
    before = compiled()
    assert before > 5
    for length in (33, 150, 700):
        gpu.generate([prompt_of(length, 1000)] * 3, 40, stop_tokens=())
    assert compiled() == before


def test_tiny_uses_every_feature_of_the_architecture(tiny):
    checkpoint = weights.load(TINY)
    c = checkpoint.config
    assert (
        checkpoint.layout == "hf-mxfp4" and c.num_local_experts >= 8 and c.num_experts_per_tok == 4
    )
    assert (
        set(c.layer_types) == set(weights.LAYER_TYPES)
        and c.num_attention_heads > c.num_key_value_heads
    )
    assert all(n % 32 == 0 and n % 128 for n in (c.hidden_size, c.intermediate_size))
    assert c.sliding_window < len(
        gptoss.chat_tokens(tiny[1], [("user", QUESTIONS[0])], "2026-01-31", "medium")
    )
    assert c.max_position_embeddings >= 4096
    assert sum(file.stat().st_size for file in TINY.iterdir()) <= 8e6


def test_a_prompt_of_4096_tokens(tiny):
    model, tokenizer = tiny
    tokens = (tokenizer.encode_ordinary("The capital of France is Paris. ") * 4096)[:4096]
    assert model.logits(tokens).isfinite().all()
    assert len(model.generate([tokens], 4)[0]) == 4


def test_command_line_answers():
    run = cli("--prompt", QUESTIONS[0], "--prompt", "-", stdin=QUESTIONS[1] + "\n")
    assert run.returncode == 0 and "TTFT" in run.stderr and "TPOT" in run.stderr
    first, second = run.stdout.splitlines()
    assert first == "[0] 17 + 25 = 42" and second == "[1] The capital of France is Paris."
    thinking = cli("--prompt", QUESTIONS[0], "--show-reasoning").stdout.splitlines()
    assert thinking[0].startswith("analysis: ") and thinking[-1] == "final: 17 + 25 = 42"
    raw = ["--raw", "--max-new-tokens", "5", "--temperature", "1", "--seed", "3"]
    runs = [cli("--prompt", "The capital of", *raw) for _ in range(2)]
    assert runs[0].returncode == 0 and runs[0].stdout.strip() and runs[0].stdout == runs[1].stdout


def test_a_newline_at_the_end_of_standard_input_is_nobodys():
    sums = [(a, b) for a in (2, 5, 9) for b in (3, 6)]
    asked = [f"What is {a} + {b}?\n" for a, b in sums]
    answers = [cli("--prompt", "-", stdin=text).stdout for text in asked[:2]]
    assert answers == [f"{a} + {b} = {a + b}\n" for a, b in sums[:2]]


USAGE = [
    (["--prompt", "x", "--fast"], "unrecognized arguments: --fast"),
    ([], "give --prompt TEXT (- is standard input) or --chat"),
    (["--chat", "--prompt", "x"], "--chat asks for the prompts itself: leave out --prompt"),
    (["--prompt", "-", "--prompt", "-"], "--prompt - can read standard input only once"),
    (["--chat", "--raw"], "--chat needs the chat format: leave out --raw"),
    (["--prompt", "x", "--raw", "--instructions", "y"], "--instructions belong to a chat"),
    (["--prompt", "x", "--ops", "cuda"], "argument --ops: invalid choice: 'cuda'"),
    (["--prompt", "x", "--emulate", "--ops", "torch"], "--emulate runs the gluon kernels"),
    (["--prompt", "x", "--emulate", "--device", "cuda"], "--emulate runs on the cpu"),
    (["--prompt", "x", "--temperature", "nan"], "argument --temperature: 'nan' is no finite"),
    (["--prompt", "x", "--temperature", "inf"], "argument --temperature: 'inf' is no finite"),
    (["--prompt", "x", "--temperature", "-1"], "argument --temperature: '-1' is no finite"),
    (["--prompt", "x", "--top-p", "0"], "argument --top-p: '0' is no number in (0, 1]"),
    (["--prompt", "x", "--top-k", "0"], "argument --top-k: '0' is no whole number"),
    (["--prompt", "x", "--max-new-tokens", "1e3"], "argument --max-new-tokens: '1e3' is no whole"),
    (["--prompt", "x", "--effort", "extreme"], "argument --effort: invalid choice: 'extreme'"),
]
BAD = [
    (["--prompt", "x", "--checkpoint", "/nowhere"], "/nowhere"),
    (["--prompt", ""], "prompt 0 is empty"),
    (["--prompt", "x", "--max-new-tokens", "9999999"], "--max-new-tokens=9999999 exceed"),
    (["--prompt", "x", "--num-pages", "1"], "the pool has 1; raise --num-pages or lower"),
    (["--prompt", "x", "--num-pages", "999999999"], "--num-pages 999999999 do not fit the free"),
    (["--prompt", "x", "--device", "nope"], "--device 'nope' cannot be used here"),
    (["--prompt", "x", "--device", "meta"], "--device 'meta' holds no values"),
    (["--prompt", "x", "--activations", "fp8"], "--activations 'fp8' need the static input scales"),
]


@pytest.mark.parametrize(
    "args, code, message", [(a, 2, m) for a, m in USAGE] + [(a, 1, m) for a, m in BAD]
)
def test_command_line_errors(args, code, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gptoss.py", *args])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    try:
        found = gptoss.main()
    except SystemExit as exit:
        found = exit.code
    out, err = capsys.readouterr()
    assert (found, out) == (code, "") and message in err
    assert err.splitlines()[-1].startswith("gptoss: ") and len(err.splitlines()[-1:]) == 1


def test_options_without_effect_are_named():
    run = cli("--prompt", QUESTIONS[0], "--top-k", "5", "--seed", "3")
    assert (run.returncode, run.stdout) == (0, "17 + 25 = 42\n")
    assert "gptoss: --top-k has no effect without --temperature" in run.stderr
    assert "gptoss: --seed has no effect without --temperature" in run.stderr


def test_an_answer_without_a_final_channel_says_why():
    short = cli("--prompt", QUESTIONS[0], "--max-new-tokens", "8")
    assert (short.returncode, short.stdout) == (0, "\n")
    assert "no final channel within 8 tokens; raise --max-new-tokens" in short.stderr


@pytest.mark.parametrize("text, everything, shown", [
    ("I'm sorry.<|return|>", False, "I'm sorry."),
    ("<|channel|>commentary to=functions.f<|message|>{}<|call|>", False,
     "commentary to functions.f: {}"),
    ("<|channel|>analysis<|message|>Hm.<|end|>", False, ""),
    ("<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>42",
     True, "analysis: Hm.\nfinal: 42"),
    ("<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>42",
     False, "42"),
])  # fmt: skip
def test_what_is_shown_of_a_completion(tiny, text, everything, shown):
    answer = gptoss.Answer(tiny[1], True, everything)
    for token in tiny[1].encode(text, allowed_special="all"):
        answer.add(answer.reader.read(token))
    answer.add(answer.reader.close())
    assert answer.text == shown


# --------------------------------------------------------------------------------------------------
# The terminal


def shell(command: str, **options) -> subprocess.CompletedProcess:
    """`gptoss` in a shell command stands for the program."""
    program = f"{sys.executable} {ROOT / 'gptoss.py'}"
    command = command.replace("gptoss", program)
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, **options)


@pytest.mark.skipif(sys.platform != "linux", reason="shells and devices of Linux")
@pytest.mark.parametrize("command, code, message", [
    ("gptoss --prompt Hi >&-", 1, "standard output is closed"),
    ("set -o pipefail; gptoss --prompt Hi | true", 1, "standard output: Broken pipe"),
    ("gptoss --prompt Hi >/dev/full", 1, "standard output: No space left on device"),
    ("gptoss --prompt - <&-", 1, "--prompt -: standard input is closed"),
    ("gptoss --chat <&-", 1, "--chat: standard input is closed"),
    ("printf 'a\\xff' | gptoss --prompt -", 1, "--prompt -: standard input is not UTF-8"),
    ("printf 'a\\xff\\n' | gptoss --chat", 1, "--chat: standard input is not UTF-8"),
    ("TRITON_CACHE_DIR=/proc/none gptoss --prompt Hi --raw --emulate", 1, "/proc/none"),
])  # fmt: skip
def test_what_a_terminal_can_do_to_it_is_one_line(command, code, message):
    if "--emulate" in command and importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is installed on Linux only")
    run = shell(command)
    assert run.returncode == code and message in run.stderr and "Traceback" not in run.stderr


def test_a_terminal_without_the_answers_characters():
    """An answer's character that ASCII lacks is replaced, not fatal."""
    code = "import sys, gptoss; gptoss.run = lambda *_: print('\u00e9', end='');"
    code += "sys.argv = ['gptoss', '--prompt', 'x']; sys.exit(gptoss.main())"
    env = os.environ | {"PYTHONIOENCODING": "ascii:strict"}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True)
    assert (run.returncode, run.stdout) == (0, b"?")


@pytest.mark.parametrize("seconds", [0.05, 0.4, 1.0, 2.0, 3.5])
def test_an_interrupt_at_any_moment(seconds):
    command = [sys.executable, str(ROOT / "gptoss.py"), "--prompt", "x " * 300]
    command += ["--raw", "--max-new-tokens", "7000"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    # Before Python runs the program's first line, the interpreter itself is interrupted.
    assert process.returncode == 130 or seconds < 0.4
    assert "Traceback" not in err or seconds < 0.4
    if out:
        assert out.endswith("\n") and "tokens | TTFT" in err


# --------------------------------------------------------------------------------------------------
# Chat


def test_chat_keeps_the_conversation():
    run = cli("--chat", stdin="What is 17 + 25?\n\nWhat is the capital of France?\n")
    assert run.returncode == 0 and run.stdout == "17 + 25 = 42\nThe capital of France is Paris.\n"


def chat_arguments(*more: str):
    return gptoss.arguments().parse_args(["--chat", "--max-new-tokens", "60", *more])


def test_a_turn_prefills_only_what_is_new(tiny, monkeypatch, capsys):
    """Its answers are those of the whole conversation, prefilled at once."""
    model, tokenizer = tiny
    lengths, forward, said = [], model.forward, []
    monkeypatch.setattr(model, "forward", lambda t, *a: lengths.append(len(t)) or forward(t, *a))
    monkeypatch.setattr(gptoss, "answer", lambda e, a, f=gptoss.answer: said.append(e) or f(e, a))
    questions = ["What is 17 + 25?", "What is the capital of France?", "Sort 9, 2 and 5."]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(questions) + "\n"))
    gptoss.converse(model, tokenizer, chat_arguments("--page-size", "4"))
    answers = capsys.readouterr().out.splitlines()
    assert answers == ["17 + 25 = 42", "The capital of France is Paris.", "In order: 2, 5, 9."]
    prefills = [n for n in lengths if n > 1]
    turns, want, cached = [], [], 0
    for question, reply in zip(questions, answers, strict=True):
        turns.append(("user", question))
        tokens = gptoss.chat_tokens(tokenizer, turns, str(datetime.date.today()), "medium")
        want.append(len(tokens) - cached)
        cached = len(tokens)
        turns.append(("assistant", reply))
        new = model.generate([tokens], 60)[0]
        whole = gptoss.parse_completion(tokenizer, new)
        assert whole[-1].text == reply
    assert prefills[:3] == want and len(set(map(id, said))) == 1
    engine = said[0]
    engine.cache.release(engine.prefix.tables)
    assert sorted(engine.cache.free) == list(range(1, engine.cache.num_pages + 1))


def test_a_conversation_that_is_too_long_forgets_its_oldest_turns(tiny, monkeypatch, capsys):
    questions = [f"What is {n} + {n}?" for n in range(2, 9)]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(questions) + "\n"))
    pages = ["--num-pages", "18"]  # of 16 tokens
    gptoss.converse(*tiny, chat_arguments(*pages))
    out, err = capsys.readouterr()
    assert out.splitlines() == [f"{n} + {n} = {2 * n}" for n in range(2, 9)]
    assert "its oldest question and answer are forgotten" in err
    monkeypatch.setattr(sys, "stdin", io.StringIO("word " * 300 + "\nWhat is 2 + 2?\n"))
    gptoss.converse(*tiny, chat_arguments(*pages))
    out, err = capsys.readouterr()
    assert out == "2 + 2 = 4\n" and "the pool has 18; raise --num-pages or lower" in err


def test_an_interrupt_ends_the_answer_not_the_chat(tiny, monkeypatch, capsys):
    model, tokenizer = tiny
    calls, forward = [], model.forward

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 30:
            raise KeyboardInterrupt
        return forward(*args)

    monkeypatch.setattr(model, "forward", interrupted)
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is 17 + 25?\nWhat is 2 + 2?\n"))
    gptoss.converse(model, tokenizer, chat_arguments("--show-reasoning"))
    out, err = capsys.readouterr()
    assert out.startswith("analysis: ") and out.endswith("final: 2 + 2 = 4\n")
    assert err.count("tokens | TTFT") == 2


# --------------------------------------------------------------------------------------------------
# Numbers


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_logits_are_an_error(tmp_path, temperature):
    model = GPTOSS.from_pretrained(make(tmp_path))
    model.layers[1].sinks[0] = float("nan")
    with pytest.raises(ValueError, match="prompt 0, token 4: the logits are NaN"):
        model.generate([prompt_of(4)], 5, temperature)


def test_a_small_temperature_is_greedy():
    logits = torch.tensor([[1.0, 3.0, 3.0 - 2**-20, -1.0]])
    for temperature in (1e-10, 1e-38, 1e-300, 5e-324):
        for draw in (0.0, 0.5, 1 - 2**-53):
            found = gptoss.sample(
                logits, torch.tensor([draw]).double(), gptoss.Sampling(temperature)
            )
            assert found.tolist() == [1]


@pytest.mark.parametrize("options, message", [
    (dict(temperature=float("nan")), "temperature=nan, expected a finite number"),
    (dict(temperature=float("inf")), "temperature=inf, expected a finite number"),
    (dict(temperature="1"), "temperature='1', expected a finite number"),
    (dict(top_p=1.5), "top_p=1.5, expected a number in"),
    (dict(top_k=2.5), "top_k=2.5, expected a whole number of at least 1"),
    (dict(seed="x"), "seed='x', expected a whole number"),
    (dict(max_new_tokens=1.5), "max_new_tokens=1.5, expected a whole number"),
    (dict(page_size=True), "page_size=True, expected a whole number"),
    (dict(num_pages=-3), "num_pages=-3, expected a whole number"),
])  # fmt: skip
def test_arguments_of_a_wrong_type_are_named(tiny, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny[0].generate([[1]], **dict(max_new_tokens=2) | options)


def test_prompts_of_a_wrong_type_are_named(tiny):
    for prompts in (["Hello"], [[1.5]], [5], [[None]]):
        with pytest.raises(TypeError, match="prompt 0 is no list of token numbers"):
            tiny[0].generate(prompts, 2)
    assert tiny[0].generate([torch.tensor([5, 6])], 2) == tiny[0].generate([[5, 6]], 2)


def test_draws_do_not_depend_on_the_place_in_the_batch(tmp_path):
    model = GPTOSS.from_pretrained(make(tmp_path))
    prompts = [prompt_of(4), prompt_of(6, seed=1), prompt_of(9, seed=2)]
    options = dict(temperature=1.5, seed=7)
    together = model.generate(prompts, 20, **options)
    assert model.generate(prompts[::-1], 20, **options) == together[::-1]
    assert [model.generate([p], 20, **options)[0] for p in prompts] == together


EMULATED = [*QUESTIONS, "Reverse the word lamp.", "What is the capital of Peru?"]


@needs_triton
@pytest.mark.parametrize("count", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_emulated_kernels_give_the_torch_paths_answers(tiny, count):
    import gfx950

    tokenizer = tiny[1]
    prompts = [
        gptoss.chat_tokens(tokenizer, [("user", q)], "2026-01-31", "low") for q in EMULATED[:count]
    ]
    stop = [tokenizer.encode_single_token("<|return|>")]
    torch_path = GPTOSS.from_pretrained(
        TINY, dtype=torch.bfloat16, ops="torch", activations="mxfp8"
    )
    assert torch_path.ops is gptoss.EQUATIONS
    with gfx950.emulate() as gpu:
        model = GPTOSS.from_pretrained(TINY)  # auto: the kernels, where a gfx950 is active
        assert (model.dtype, model.activations) == (torch.bfloat16, "mxfp8")
        answers = model.generate(prompts, 80, stop_tokens=stop)
    assert answers == torch_path.generate(prompts, 80, stop_tokens=stop)
    # All of a decode step of one sequence runs on the emulated card: two norms, two dense layers,
    # attention and three launches of the MoE layer; the last norm and the unembedding.
    layers = model.config.num_hidden_layers
    launched = [launch.name.removesuffix("_kernel") for launch in gpu.launches]
    layer = ["add_norm", "linear", "decode", "linear", "add_norm", "route", "dispatch", "combine"]
    assert launched[-8 * layers - 2 :] == layer * layers + ["add_norm", "linear"]


@needs_triton
def test_which_operations_run_where(monkeypatch):
    import gfx950
    import moe_gluon
    import ops_triton

    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    with gfx950.emulate():
        assert gptoss.choose_ops("torch", cpu) is gptoss.EQUATIONS
        assert gptoss.choose_ops("triton", cpu).moe is ops_triton.moe
        gluon = gptoss.choose_ops("auto", cpu)
        assert gluon.moe is moe_gluon.moe and gluon.attention is ops_triton.attention
        with pytest.raises(ValueError, match="dtype=torch.float32, these ops compute in"):
            GPTOSS.from_pretrained(TINY, dtype=torch.float32)
        driver = type(gfx950.Driver(None))
        monkeypatch.setattr(driver, "get_active_torch_device", lambda self: cuda)  # a real gfx950
        assert gptoss.choose_ops("auto", cpu) is gptoss.EQUATIONS
        assert gptoss.choose_ops("auto", cuda).moe is moe_gluon.moe
        monkeypatch.setattr(moe_gluon, "is_supported", lambda: False)  # another GPU
        assert gptoss.choose_ops("auto", cuda).moe is ops_triton.moe
        with pytest.raises(ValueError, match="ops='gluon' needs a gfx950"):
            gptoss.choose_ops("gluon", cuda)


def test_without_a_gpu_only_the_equations_run():
    cpu = torch.device("cpu")
    if not torch.cuda.is_available():
        assert gptoss.choose_ops("auto", cpu) is gptoss.EQUATIONS
    for name in ("triton", "gluon"):
        with pytest.raises(ValueError, match=f"ops='{name}' needs Triton with an active GPU"):
            gptoss.choose_ops(name, cpu)


def test_equations_need_neither_triton_nor_the_kernels(tmp_path):
    """The first command where Triton cannot be imported and the kernels' files are gone."""
    for name in ("gptoss.py", "weights.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(TINY, tmp_path / "tiny")
    blocked = "import sys; sys.modules.update(triton=None, resource=None); sys.path.insert(0, '');"
    code = blocked + "import runpy; runpy.run_path('gptoss.py', run_name='__main__')"
    command = [sys.executable, "-c", code, "--prompt", QUESTIONS[0]]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "17 + 25 = 42\n") and "TPOT" in run.stderr
    run = subprocess.run([*command, "--emulate"], cwd=tmp_path, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (1, "") and "Traceback" not in run.stderr
    assert "--emulate needs Triton and the emulator in gfx950/" in run.stderr


@needs_triton
@pytest.mark.parametrize("room", gptoss.KERNELS)
def test_a_room_of_kernels_that_is_gone_leaves_the_equations(monkeypatch, room):
    import gfx950

    find, cpu = importlib.util.find_spec, torch.device("cpu")
    with gfx950.emulate():
        assert gptoss.driven_by_triton(cpu)
        monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == room else find(n))
        assert gptoss.choose_ops("auto", cpu) is gptoss.EQUATIONS


@needs_triton
def test_command_line_emulates():
    run = cli("--emulate", "--raw", "--prompt", "What", "--max-new-tokens", "2")
    assert (
        run.returncode == 0
        and "emulated gfx950: " in run.stderr
        and "dispatch_kernel" in run.stderr
    )


def test_readme_commands(tmp_path):
    """The two commands are there with every pin, and the Python example answers from any folder."""
    readme, requirements = (ROOT / "README.md").read_text(), (ROOT / "requirements.txt").read_text()
    names = [line.partition("==")[0] for line in requirements.splitlines()]
    assert sorted(names) == ["numpy", "safetensors", "tiktoken", "torch", "triton"]
    commands = re.findall(r"^pip install -r requirements.txt.*$", readme, re.M)
    first = r'pip install -r requirements.txt && python gptoss.py --prompt "(.*)"'
    assert re.fullmatch(first, commands[0])
    second = r"pip install -r requirements.txt( [a-z-]+==\S+)+ && python -m pytest -n 2"
    assert re.fullmatch(second, commands[1]) and len(commands) == 2
    assert commands[1] not in (ROOT / ".ci/run").read_text()  # CI reads it from the README
    (example,) = re.findall(r"```python\n(.*?)```", readme, re.S)
    run = subprocess.run(
        [sys.executable, "-c", example],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0 and "Paris" in run.stdout, run.stderr
    for file in re.findall(r"^\| `(.*?)`(?:, `(.*?)`)? \|", readme, re.M):
        assert all((ROOT / name).exists() for name in file if "." in name or "/" in name), file


def test_documents_name_files_that_exist():
    for document in ("README.md", "docs/kernels.md", "docs/emulator.md", "docs/performance.md"):
        text = (ROOT / document).read_text()
        for link in re.findall(r"\]\(([^)#: ]+)\)", text):
            assert (ROOT / document).parent.joinpath(link).exists(), (document, link)
        for script in re.findall(r"^(?:\$ )?python (\S+\.py)", text, re.M):
            assert (ROOT / script).exists(), (document, script)
    assert len((ROOT / "README.md").read_bytes()) <= 8192
