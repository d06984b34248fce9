"""Lightning: ``Trainer(callbacks=[OptimizerStateCompression(policy)])``, for both Lightning packages."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_sketch.integrations.deepspeed import attach
from lightning_sketch.integrations.lightning_load import ReshardingLoad
from lightning_sketch.layers.record import LayerRecord
from lightning_sketch.layers.roles import named_layers
from lightning_sketch.memory import report
from lightning_sketch.monitor import Monitor
from lightning_sketch.optimizer.base import CompressedOptimizer
from lightning_sketch.optimizer.classes import COMPRESSED
from lightning_sketch.optimizer.convert import compress_all
from lightning_sketch.optimizer.groups import NO_MONITOR
from lightning_sketch.optimizer.in_backward import refuse_settings
from lightning_sketch.optimizer.nonfinite import NonFinite
from lightning_sketch.policy.plan import LayerPlan
from lightning_sketch.policy.policy import Policy, as_policy, plan
from lightning_sketch.policy.recorded import policy_hint
from lightning_sketch.rules.inside import unwrap
from lightning_sketch.sharding import is_dtensor, local
from lightning_sketch.text import human_bytes

_PACKAGES = ("lightning.pytorch", "pytorch_lightning")
#: Strategies under which the optimizer's parameters cannot be told apart.
_REFUSED_STRATEGIES = {
    "FSDPStrategy": "it flattens parameters into one-dimensional shards that cut rows (FSDP1); use FSDP2, that is "
    "ModelParallelStrategy with fully_shard in configure_model, or use DDPStrategy",
}


def _callback_bases() -> tuple[type, ...]:
    """``Callback`` of each Lightning package in use: LightningCLI accepts subclasses of its own package's only.

    In use means imported before this module. Importing the other one, where both are installed, would redirect the log
    of the first.
    """
    names = [name for name in _PACKAGES if sys.modules.get(name)]
    if not names:
        names = [name for name in _PACKAGES if importlib.util.find_spec(name.split(".")[0])][:1]
    if not names:
        raise ImportError("OptimizerStateCompression needs Lightning: pip install lightning")
    return tuple(importlib.import_module(name).Callback for name in names)


# No TYPE_CHECKING import of Callback: jsonargparse executes those, and either package may be missing.
_Callback: Any = type("_Callback", _callback_bases(), {})


class OptimizerStateCompression(_Callback):  # type: ignore[misc]
    """Compress the states of the optimizers that ``configure_optimizers`` returns.

    Conversion happens once, right after ``configure_optimizers``, in place and before a checkpoint is restored, so
    schedulers, ``self.optimizers()``, precision plugins and resuming work as without it. An uncompressed checkpoint
    resumes compressed, and one of FSDP2 on another number of ranks, too. Nothing is kept in the callback's own
    checkpoint state.

    Works under single-device strategies, DDP, FSDP2 (``ModelParallelStrategy``) and DeepSpeed's ZeRO. Where parameters
    are sharded, every figure that is printed or logged is that of rank zero's part.

    With several optimizers the policy is resolved once over the whole module. An optimizer of a class without an update
    rule of ours is left alone if the policy decides none of its layers, and one of plain tensors alone always. One that
    was converted by hand, with a part of the module perhaps, stays as it is if that was under the same policy.

    Args:
        policy: a `Policy`, its dictionary, the path of its YAML file, or ``None`` for the default policy.
        nonfinite: see `lightning_sketch.compress`.
        allow_empty: whether the policy may compress nothing of what the optimizers train; see
            `lightning_sketch.compress`. It is judged over all optimizers together; beside a BaseFinetuning callback,
            which adds layers later, it is a warning only.
        log_memory: print the plan at conversion and one line of bytes after the first step, where Lightning prints
            such things, and log ``optimizer_state/...`` bytes once to the trainer's loggers.
        step_in_backward: see `lightning_sketch.compress`. A trainer that clips or accumulates gradients, scales the
            loss, or trains under DDP or DeepSpeed is refused.
        monitor: a `Monitor` of how well the states do, whose figures are logged to the trainer's loggers whenever they
            were made. Not under DeepSpeed.

    Raises:
        TypeError, ValueError: from ``trainer.fit``, if the optimizer or the policy does not fit.
        RuntimeError: from ``trainer.fit``, if the trainer's optimizers did not come from ``configure_optimizers``.
    """

    def __init__(
        self,
        policy: Policy | dict[str, Any] | str | None = None,
        nonfinite: NonFinite = "raise",
        log_memory: bool = True,
        allow_empty: bool = False,
        step_in_backward: bool = False,
        monitor: Monitor | None = None,
    ) -> None:
        super().__init__()
        self._explicit = policy is not None
        self.policy = as_policy(policy)
        self.nonfinite: NonFinite = nonfinite
        self.log_memory = log_memory
        self.allow_empty = allow_empty
        self.step_in_backward = step_in_backward
        self.monitor = monitor
        self._logged = 0  # figures of the monitor
        self._patch: _Patch | None = None
        self._load_patch: ReshardingLoad | None = None
        self._left_alone: list[Optimizer] = []
        self._to_log = self._layers_are_added = False

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Patch ``configure_optimizers`` for one call."""
        if stage != "fit":
            return
        for refused, reason in _REFUSED_STRATEGIES.items():
            if _is_strategy(trainer, refused):
                raise ValueError(f"OptimizerStateCompression does not work with {refused}: {reason}")
        if self.step_in_backward:
            _refuse_step_in_backward(trainer)
        if self.monitor is not None and _is_strategy(trainer, "DeepSpeedStrategy"):
            raise ValueError(f"OptimizerStateCompression(monitor=...): {NO_MONITOR}")
        classes = {cls.__name__ for callback in trainer.callbacks for cls in type(callback).__mro__}
        self._layers_are_added = "BaseFinetuning" in classes
        self._patch = _Patch(pl_module, self._convert)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Verify that no optimizer trains uncompressed by accident, and that what was to be sharded is."""
        for wrapped in trainer.optimizers:
            optimizer = unwrap(wrapped)
            mock = type(optimizer).__name__ == "_MockOptimizer"  # configure_optimizers returned None; Lightning warns
            if mock or any(optimizer is other for other in self._left_alone):
                continue
            if _is_strategy(trainer, "DeepSpeedStrategy"):
                attach(
                    wrapped
                )  # before a checkpoint is restored; refuses an optimizer that DeepSpeed put in ours' place
            if not isinstance(optimizer, CompressedOptimizer):
                raise RuntimeError(
                    f"the trainer's {type(optimizer).__name__} did not come from configure_optimizers, so "
                    "OptimizerStateCompression could not convert it; return it from there, or call "
                    "lightning_sketch.compress on it yourself and remove the callback"
                )
        if _is_strategy(trainer, "ModelParallelStrategy"):
            _check_data_parallel_size(trainer)
            self._load_patch = ReshardingLoad(trainer.strategy)
        self._to_log = self.log_memory

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Verify that what was restored is what the policy says: BaseFinetuning takes whole groups from checkpoints."""
        wrong: list[str] = []
        decided: list[LayerRecord] = []
        found: list[LayerRecord] = []
        for optimizer in map(unwrap, trainer.optimizers):
            # DeepSpeed's flat tensors are no parameters to plan for, and nothing can have replaced their groups.
            if isinstance(optimizer, CompressedOptimizer) and not any(map(optimizer.is_flat, optimizer.param_groups)):
                planned = plan(pl_module, optimizer, self.policy).layers
                shown = [group for group in optimizer.param_groups if group["params"]]  # ZeRO-3 hides them
                records = [record for group in shown for record in optimizer.records(group)]
                pairs = zip(planned, records, strict=True)
                wrong += [x.layer.fqn for x, record in pairs if not _is_as_planned(x, record)]
                decided += [x.layer for x in planned if x.layer.compressed]
                found += [LayerRecord.from_record(record).as_decided() for record in records if record is not None]
        if wrong:
            raise ValueError(
                f"the checkpoint's parameter groups were written under another policy: {', '.join(wrong)}; "
                "load it with the policy and seed it was written under." + policy_hint(found, decided, self.policy.seed)
            )

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        """Log memory once, when the states exist, and what the monitor has measured."""
        if self.monitor is not None and self.monitor.made != self._logged:
            self._logged = self.monitor.made
            for trainer_logger in trainer.loggers:
                trainer_logger.log_metrics(self.monitor.figures(), step=trainer.global_step)
        if not self._to_log or not any(optimizer.state for optimizer in map(unwrap, trainer.optimizers)):
            return
        self._to_log = False
        reports = [report(optimizer) for optimizer in trainer.optimizers]
        state, dense = sum(r.state for r in reports), sum(r.dense_state for r in reports)
        here = " on this rank" if any(map(_is_sharded, map(unwrap, trainer.optimizers))) else ""
        _say(
            f"optimizer state{here}: {human_bytes(state)} instead of {human_bytes(dense)}, "
            f"{dense / max(1, state):.1f}x less; "
            f"step temporaries at most {human_bytes(max(r.transient for r in reports))}; "
            f"process peak so far {human_bytes(reports[0].process_peak)}"
        )
        totals: dict[str, int] = {}
        for r in reports:
            for key, value in r.to_dict().items():
                totals[key] = max(totals.get(key, 0), value) if "transient" in key else totals.get(key, 0) + value
        for trainer_logger in trainer.loggers:
            trainer_logger.log_metrics(totals, step=trainer.global_step)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the module as it was; Lightning calls no teardown then."""
        self._unpatch()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the module as it was, and keep no optimizer alive."""
        self._unpatch()
        self._left_alone = []

    def _unpatch(self) -> None:
        if self._patch is not None:
            self._patch.undo()
        if self._load_patch is not None:
            self._load_patch.undo()
        self._patch = self._load_patch = None

    def _convert(self, configured: Any, pl_module: Any) -> None:
        layers = named_layers(pl_module, self.policy.role_hints)
        decided = {key for key, rule in self.policy.assign(layers).items() if self.policy.rules[rule].codecs}
        self._left_alone = []
        ours = []
        for optimizer in _optimizers_in(configured):
            inner = unwrap(optimizer)
            touched = any(id(p) in decided for group in inner.param_groups for p in group["params"])
            foreign = type(inner) not in COMPRESSED and not isinstance(inner, CompressedOptimizer)
            parameters = any(isinstance(p, nn.Parameter) for group in inner.param_groups for p in group["params"])
            if not touched and (foreign or not parameters):
                self._left_alone.append(inner)
            else:
                ours.append(optimizer)
        if not (ours or self._left_alone):
            return  # Lightning warns
        compress_all(
            ours,
            pl_module,
            self.policy,
            explicit=self._explicit,
            nonfinite=self.nonfinite,
            allow_empty=self.allow_empty or self._layers_are_added,
            step_in_backward=self.step_in_backward,
            monitor=self.monitor,
        )
        for optimizer in ours:
            made = plan(pl_module, optimizer, self.policy)  # not later: DeepSpeed will replace the parameters
            if self.log_memory and any(x.layer.compressed for x in made.layers):
                _say(str(made))


def _refuse_step_in_backward(trainer: Any) -> None:
    """Refuse what a trainer does to gradients after they are complete.

    Raises:
        ValueError: it does something; says what to set.
    """
    schedules = [callback for callback in trainer.callbacks if hasattr(callback, "going_to_accumulate_grad_batches")]
    refuse_settings(
        {
            f"gradient_clip_val={trainer.gradient_clip_val}: clipping needs all gradients at once": (
                trainer.gradient_clip_val
            ),
            f"accumulate_grad_batches={trainer.accumulate_grad_batches}: a layer would be stepped in every batch": (
                trainer.accumulate_grad_batches != 1
            ),
            "GradientAccumulationScheduler: a layer would be stepped in every batch": any(
                schedule.going_to_accumulate_grad_batches() for schedule in schedules
            ),
            f'precision="{trainer.precision}": a GradScaler unscales gradients after backward; use "bf16-mixed"': (
                getattr(trainer.precision_plugin, "scaler", None) is not None
            ),
            f"{type(trainer.strategy).__name__}: it averages gradients after they are complete; use "
            "ModelParallelStrategy (FSDP2)": _is_strategy(trainer, "DDPStrategy"),  # DeepSpeedStrategy is one
        }
    )


def _is_as_planned(planned: LayerPlan, record: str | None) -> bool:
    """Whether a parameter's record is what the policy says; under another name it has another seed, too."""
    if record is None or planned.record is None:
        return record is planned.record
    found = LayerRecord.from_record(record).as_decided()
    if found.fqn != planned.layer.fqn:  # converted by hand with a part of the module, and stepped
        found = dataclasses.replace(found, fqn=planned.layer.fqn, seed=planned.layer.seed)
    return found == planned.layer


def _optimizers_in(configured: Any) -> list[Any]:
    """All optimizers in any form that ``configure_optimizers`` may return."""
    if isinstance(configured, dict):
        return _optimizers_in(configured.get("optimizer"))
    if isinstance(configured, list | tuple):
        return [optimizer for item in configured for optimizer in _optimizers_in(item)]
    # Schedulers stand beside optimizers in some forms, and have an `optimizer` attribute too.
    is_wrapper = hasattr(configured, "optimizer") and hasattr(configured, "param_groups")
    return [configured] if isinstance(configured, Optimizer) or is_wrapper else []


class _Patch:
    """Stands in for the ``configure_optimizers`` of one module, for one call.

    Args:
        pl_module: the module, patched at once.
        convert: called with what ``configure_optimizers`` returned, and the module.
    """

    def __init__(self, pl_module: Any, convert: Callable[[Any, Any], None]) -> None:
        self.pl_module, self.convert = pl_module, convert
        self.own = pl_module.__dict__.get("configure_optimizers")  # LightningCLI sets one on the instance
        self.__wrapped__ = pl_module.configure_optimizers  # Lightning looks here to see whether a hook is overridden
        pl_module.configure_optimizers = self

    def __call__(self) -> Any:
        self.undo()
        configured = self.__wrapped__()
        self.convert(configured, self.pl_module)
        return configured

    def undo(self) -> None:
        """Leave the module as it was."""
        if self.pl_module.__dict__.get("configure_optimizers") is not self:
            return
        if self.own is None:
            del self.pl_module.configure_optimizers
        else:
            self.pl_module.configure_optimizers = self.own

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # WeightAveraging copies the module in its own setup: the copy gets its own method, bound to itself.
        return copy.deepcopy(self.__wrapped__, memo)


def _is_strategy(trainer: Any, name: str) -> bool:
    """Whether the trainer's strategy is of that class, of either Lightning package, or a subclass of it."""
    return any(cls.__name__ == name for cls in type(trainer.strategy).__mro__)


def _is_sharded(optimizer: Optimizer) -> bool:
    """Whether some of its parameters are partly on other ranks."""
    flat = optimizer.compression.flat if isinstance(optimizer, CompressedOptimizer) else None
    if flat is not None and flat.divided:  # DeepSpeed's ZeRO
        return True
    return any(_is_part(p) for group in optimizer.param_groups for p in group["params"])


def _is_part(param: Any) -> bool:
    return is_dtensor(param) and local(param).numel() < param.numel()


def _check_data_parallel_size(trainer: Any) -> None:
    """Warn if Lightning's default leaves nothing for ``fully_shard`` to shard over."""
    if trainer.world_size == 1 or trainer.strategy.device_mesh["data_parallel"].size() > 1:
        return
    converted = [o for o in map(unwrap, trainer.optimizers) if isinstance(o, CompressedOptimizer)]
    layers = [param for optimizer in converted for _, _, param in optimizer.compressed_layers()]
    if layers and not any(map(_is_part, layers)):
        from lightning_utilities.core.rank_zero import rank_zero_warn

        rank_zero_warn(
            "ModelParallelStrategy runs with data_parallel_size=1 ('auto' is the number of nodes), so that fully_shard "
            f"shards nothing: each of {trainer.world_size} processes holds every compressed layer with all its states. "
            f"Pass ModelParallelStrategy(data_parallel_size={trainer.world_size}, tensor_parallel_size=1)"
        )


def _say(message: str) -> None:
    """Print as Lightning prints "GPU available", on rank zero."""
    from lightning_utilities.core.rank_zero import rank_zero_info  # here: without Lightning the error above is clearer

    rank_zero_info(message)
