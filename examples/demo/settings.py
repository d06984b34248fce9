"""Everything that both trainings share. One value for both: the compression is the only difference."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Settings:
    """Sizes, learning rates and seed of one training.

    The learning rates are the best that a short search found for the *uncompressed* run.
    """

    steps: int = 2000
    dim: int = 128  # columns of both tables
    context: int = 8  # tokens that the model sees
    hidden: int = 512
    negatives: int = 1024  # sampled classes, shared by the batch

    windows: int = 32  # a batch is windows x length tokens
    length: int = 32
    table_lr: float = 16e-3  # SparseAdam
    hidden_lr: float = 2e-3  # AdamW
    warmup: float = 0.05  # part of the steps, then a straight line to 2 %
    seed: int = 0

    validations: int = 5  # points on the validation curve
    validation_tokens: int = 12_288

    def __post_init__(self) -> None:
        if self.steps < self.validations:
            raise ValueError(f"steps={self.steps} must be at least validations={self.validations}")

    @property
    def batch_tokens(self) -> int:
        return self.windows * self.length

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Settings:
        return Settings(**json.loads(text))


# As many rows as ever: smaller tables would not be compressed.
FAST = Settings(
    steps=20,
    dim=16,
    hidden=64,
    negatives=128,
    windows=8,
    validations=2,
    validation_tokens=1024,
)
