"""Where Triton is not installed, the tests of what needs it are left out."""

import importlib.util

HAS_TRITON = importlib.util.find_spec("triton") is not None
collect_ignore = [] if HAS_TRITON else ["test_gfx950.py", "test_gfx950_kernels.py"]
collect_ignore += [] if HAS_TRITON else ["test_gfx950_published.py", "test_assembly.py"]
collect_ignore += [] if HAS_TRITON else ["test_moe_gluon.py", "test_moe_nvidia.py", "test_tools.py"]
