"""Python runs this when it starts with this folder on PYTHONPATH, see `tests.gloo.launched`."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.gloo import end_without_destructors, one_thread

del sys.path[0]
one_thread()
if "RANK" in os.environ:  # not in torchrun itself
    end_without_destructors()
