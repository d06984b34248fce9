"""Which modules are searched for tests and doctests."""

import importlib.util

# They import triton, which is optional.
TRITON = ["lightning_sketch/kernels/triton/*", "tests/kernels/triton_*.py"]
collect_ignore_glob = [] if importlib.util.find_spec("triton") else TRITON
