"""Which modules are searched for doctests."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["lightning_sketch/kernels/triton/*"]
