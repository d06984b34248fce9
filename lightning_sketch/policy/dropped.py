"""Tell the user of states that layers lose altogether."""

from __future__ import annotations

import logging

from lightning_sketch.policy.plan import Plan
from lightning_sketch.sharding.agree import is_rank_zero

logger = logging.getLogger(__name__)


def warn_of_dropped(made: Plan) -> None:
    """Warn of the states that a plan drops, on rank zero."""
    frozen = {x.layer.fqn for x in made.layers if x.stateless}
    for state, names in made.dropped().items() if is_rank_zero() else ():
        shown = [f"{fqn} (frozen now)" if fqn in frozen else fqn for fqn in names]
        # A warning, because it changes the algorithm, and Python shows warnings of unconfigured loggers.
        logger.warning("%s of %s is dropped: these layers train without it", state, ", ".join(shown))
