"""Which codec for which state of which layer."""

from lightning_sketch.policy.policy import Policy, as_policy, default_policy
from lightning_sketch.policy.rule import Rule

__all__ = ["Policy", "Rule", "as_policy", "default_policy"]
