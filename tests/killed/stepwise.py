"""Engines whose training loop is the user's."""

from __future__ import annotations

import functools
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from lightning_sketch.integrations.accelerate import load_state
from lightning_sketch.integrations.resharding import accelerate_place
from lightning_sketch.rules.inside import unwrap
from tests.checkpoints import engines
from tests.deepspeed_tools import init_deepspeed
from tests.killed.tools import MOST_SAVES, Engine, Held, Refused, held, restored

#: A step that no run makes.
ANOTHER = 10**6


class Stepwise(Engine):
    """Trains one step, or saves, at a time."""

    @functools.cached_property
    def live(self) -> Any:
        """A training, used for all that one process does after another."""
        return self.make()

    @abstractmethod
    def make(self) -> Any: ...

    @abstractmethod
    def train(self, step: int) -> None: ...

    @abstractmethod
    def save(self, path: Path) -> None: ...

    @abstractmethod
    def load(self, path: Path) -> None: ...

    @abstractmethod
    def held(self) -> Held: ...

    @property
    @abstractmethod
    def target(self) -> Any:
        """What `restore` is given."""

    def run(self, folder: Path) -> None:
        for step in range(1, MOST_SAVES + 1):
            self.train(step)
            self.save(folder / f"{step}")

    def undisturbed(self, steps: int) -> list[Held]:
        found = [self.held()]
        for step in range(1, steps + 1):
            self.train(step)
            found.append(self.held())
        return found

    def resume(self, path: Path, step: int) -> tuple[Held, Held] | Refused:
        self.train(ANOTHER)
        before = self.held()
        try:
            self.load(path)
        except (Exception, CheckpointException) as error:  # the second is a BaseException
            return Refused(f"{type(error).__name__}: {error}", before, self.held())
        loaded = self.held()
        self.train(step + 1)
        return loaded, self.held()

    def restore(self, paths: list[Path]) -> list[tuple[str, Held]]:
        return [restored(self.target, self.held, self.optimizer_in(path)) for path in paths]


class DCP(Stepwise):
    """FSDP2 with ``torch.distributed.checkpoint.save``."""

    def make(self) -> engines.Run:
        return engines.make("rows")

    def train(self, step: int) -> None:
        self.live.train(range(step, step + 1))

    def state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.live.model, self.live.optimizer)
        return {"model": model, "optimizer": optimizer}

    def save(self, path: Path) -> None:
        dcp.save(self.state(), checkpoint_id=path)

    def load(self, path: Path) -> None:
        found = self.state()
        dcp.load(found, checkpoint_id=path)
        set_state_dict(
            self.live.model, self.live.optimizer, model_state_dict=found["model"], optim_state_dict=found["optimizer"]
        )

    def held(self) -> Held:
        return held(self.live.model, self.live.optimizer)

    @property
    def target(self) -> Any:
        return self.live.optimizer


class DeepSpeed(Stepwise):
    """ZeRO-2 with ``engine.save_checkpoint``."""

    fails_together = False  # each rank loads its own file
    needed = ("zero_pp_rank_*",)

    def make(self) -> engines.Run:
        init_deepspeed(torch.distributed.get_rank(), torch.distributed.get_world_size())
        return engines.make("zero2")

    def train(self, step: int) -> None:
        self.live.train(range(step, step + 1))

    def save(self, path: Path) -> None:
        self.live.engine.save_checkpoint(str(path.parent), tag=path.name)

    def load(self, path: Path) -> None:
        loaded, _ = self.live.engine.load_checkpoint(str(path.parent), tag=path.name)
        if loaded is None:
            raise FileNotFoundError("DeepSpeed warns that it loads nothing, and goes on")

    def held(self) -> Held:
        client = unwrap(self.live.optimizer)
        found: Held = {"parameters": {}, "states": {}}
        for number, flat in enumerate(p for group in client.param_groups for p in group["params"]):
            found["parameters"][f"{number}"] = flat.detach().clone()
            for key, value in client.state.get(flat, {}).items():
                found["states"][f"{number}.{key}"] = value.clone() if isinstance(value, Tensor) else value
        return found

    @property
    def target(self) -> Any:
        return self.live.engine


@dataclass
class Accelerated:
    accelerator: Any
    model: Any
    optimizer: Any


class Accelerate(Stepwise):
    """``accelerator.save_state`` on a single process."""

    world = 1
    needed: tuple[str, ...] = ("optimizer.bin",)

    def make(self) -> Accelerated:
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True)
        model = engines.fresh_model()
        return Accelerated(accelerator, *accelerator.prepare(model, engines.optimizer_of(model)))

    def train(self, step: int) -> None:
        self.live.accelerator.backward(self.live.model(step))
        self.live.optimizer.step()
        self.live.optimizer.zero_grad()

    def save(self, path: Path) -> None:
        self.live.accelerator.save_state(str(path))

    def load(self, path: Path) -> None:
        self.live.accelerator.load_state(str(path))

    def optimizer_in(self, path: Path) -> Path:
        return accelerate_place(path, 0)[0]

    def held(self) -> Held:
        return held(self.live.model, unwrap(self.live.optimizer))

    @property
    def target(self) -> Any:
        return self.live.optimizer


class AccelerateFSDP2(Accelerate):
    """``accelerator.save_state`` under FSDP2."""

    world = 2
    needed = ("optimizer_0/*",)

    def make(self) -> Accelerated:
        from tests.integrations.test_accelerate_fsdp2 import POLICY, start

        run = start(POLICY)
        return Accelerated(run.accelerator, run.model, run.optimizer)

    def train(self, step: int) -> None:
        from tests.integrations.test_accelerate_fsdp2 import words

        rank = torch.distributed.get_rank()
        self.live.accelerator.gradient_accumulation_steps = 1
        with self.live.accelerator.accumulate(self.live.model):
            self.live.accelerator.backward(self.live.model(words(step, rank)))
            self.live.optimizer.step()
            self.live.optimizer.zero_grad()

    def load(self, path: Path) -> None:
        load_state(self.live.accelerator, path)
