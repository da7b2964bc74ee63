"""Where Triton is not installed, the tests of what needs it are left out. Under torchrun the ranks
share every model on a GPU; those on the CPU, to which the tests compare it, each has for itself:

    torchrun --nproc-per-node 2 --local-ranks-filter 0 -m pytest -x test_gptoss.py \\
        tests/test_ranks.py -k "gpu or graph or warm_up"
"""

import importlib.util
import os
import sys

import gptoss

HAS_TRITON = importlib.util.find_spec("triton") is not None
NEED_TRITON = """gfx950 gfx950_kernels gfx950_published assembly ops_triton steps steps_prefill
    attention_nvidia moe_gluon moe_nvidia tools"""
collect_ignore = [] if HAS_TRITON else [f"test_{name}.py" for name in NEED_TRITON.split()]

if "TORCHELASTIC_RUN_ID" in os.environ:
    RANKS, alone = gptoss.Ranks.join("cuda"), gptoss.GPTOSS.from_pretrained

    def from_pretrained(path, device="cpu", *args, **options) -> gptoss.GPTOSS:
        ranks = RANKS if device == "cuda" else None
        return alone(path, device, *args, ranks=ranks, **options)

    gptoss.GPTOSS.from_pretrained = from_pretrained

    def pytest_sessionfinish(session, exitstatus):
        RANKS.status = int(exitstatus)

    def pytest_unconfigure():
        sys.stdout.flush()
        if RANKS.status:
            os._exit(RANKS.status)
        RANKS.leave()
