"""Tell the user of states that layers lose altogether."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence

from lightning_sketch.policy.plan import Plan
from lightning_sketch.sharding.agree import is_rank_zero
from lightning_sketch.text import without_numbers

logger = logging.getLogger(__name__)


def warn_of_dropped(made: Plan) -> None:
    """Warn of the states that a plan drops, on rank zero."""
    frozen = {x.layer.fqn for x in made.layers if x.stateless}
    for state, names in made.dropped().items() if is_rank_zero() else ():
        # A warning, because it changes the algorithm, and Python shows warnings of unconfigured loggers.
        logger.warning("%s of %s is dropped: these layers train without it", state, ", ".join(_shown(names, frozen)))


def _shown(names: Sequence[str], frozen: Collection[str]) -> Iterator[str]:
    """Names for people: layers of repeated blocks together."""
    alike: dict[tuple[str, bool], list[str]] = {}
    for fqn in names:
        alike.setdefault((without_numbers(fqn), fqn in frozen), []).append(fqn)
    for (pattern, is_frozen), found in alike.items():
        name = found[0] if len(found) == 1 else f"{pattern} ({len(found)} layers)"
        yield f"{name} (frozen now)" if is_frozen else name
