"""Python runs this when it starts with this folder on PYTHONPATH, see `tests.gloo.launched`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.gloo import one_thread

del sys.path[0]
one_thread()
