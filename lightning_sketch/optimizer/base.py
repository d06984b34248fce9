"""What every converted optimizer does: torch's own step for kept layers, our rules for compressed ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_sketch.layers.record import RECORDS
from lightning_sketch.optimizer import state_dict as saved
from lightning_sketch.optimizer import stock_step
from lightning_sketch.optimizer.assigned import encode_assigned
from lightning_sketch.optimizer.groups import CompressedGroups
from lightning_sketch.optimizer.guard import guard_foreign_steps
from lightning_sketch.optimizer.in_backward import InBackward
from lightning_sketch.optimizer.step import pending_updates, refuse_kept_sparse, step_compressed, to_be_stepped
from lightning_sketch.policy.dropped import warn_of_dropped
from lightning_sketch.policy.plan import Plan


class CompressedOptimizer(CompressedGroups):
    """Mixin in front of a torch optimizer class. Made by `compress`; its constructor makes a plain ``stock`` optimizer.

    ``__name__`` is the stock class's, because metrics, profiles and printed optimizers are named after it; pickle goes
    by ``__qualname__``.
    """

    #: Steps compressed layers in backward; ``None`` where `step` does.
    in_backward: InBackward | None = None
    _loading = False  # whether `load_state_dict` is running

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "stock" in vars(cls):  # not what trainers derive
            cls.__name__ = cls.stock.__name__

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """A plain optimizer of the stock class for ``type(optimizer)(params, **options)``; copies pass no arguments."""
        return cls.stock(*args, **kwargs) if args or kwargs else super().__new__(cls)

    @stock_step.with_hooks
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimization step.

        Compressed layers are updated by lightning_sketch; all others by torch's own step, which does not see the
        gradients of the compressed ones meanwhile.

        Args:
            closure: reevaluates the model and returns the loss.

        Raises:
            AssertionError: ``capturable=True``, a compressed layer is on a device that has no graphs, and the step is
                not compiled. Nothing was changed then.
            FloatingPointError: rows of a compressed layer's gradient are not finite, and ``nonfinite="raise"``. They
                were left out, and everything else was stepped. On accelerators it is raised when the next step
                begins, which is not made then; of steps that a graph replays, by the next outside of it.
            RuntimeError: a step is captured into a graph that would not be another one in every replay; it was not
                made. Or a kept layer has a sparse gradient, which torch's own step does not take. Nothing was changed
                if it is the layer's in the first step.
            TypeError: a compressed layer's gradient has an unsupported layout. Nothing was changed then.
            ValueError: a layer's shape changed, its group's hyperparameters ask for what it was compressed without, or
                its states are neither what its codecs store nor dense ones. Nothing was changed then.
        """
        in_backward = self.in_backward
        if in_backward is None:
            self.compression.judge_left_out(wait=False)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._bind_if_flat():
            return loss
        with torch.no_grad():
            if not self.compression.bindings.kept_checked:
                refuse_kept_sparse(self)
                self.compression.bindings.kept_checked = True
            if in_backward is not None:
                in_backward.check()
            ours = pending_updates(self, compiling=torch.compiler.is_compiling())
            all_done = in_backward is not None and in_backward.any_stepped and all(own.grad is None for own in ours)
            ready = ours if all_done else to_be_stepped(self, ours)
            watcher = self.compression.watcher
            taken = None if watcher is None else watcher.before(self, ready)
            try:
                for own in ours:
                    own.param.grad = None
                stock_step.run(self)
            except RuntimeError:
                refuse_kept_sparse(self)  # a table whose first gradient comes in a later step
                raise
            finally:
                for own in ours:
                    own.param.grad = own.grad
            counted = step_compressed(self, ready)
            if watcher is not None:
                watcher.after(self, taken, counted)
            if in_backward is not None:
                counted = in_backward.finish(counted)
            if counted is not None:
                self.compression.take_left_out(counted)
        if in_backward is not None:  # not at the beginning: half of this step was made in backward
            self.compression.judge_left_out(wait=False)
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; the policy decides its layers.

        Raises:
            RuntimeError: the model is gone (the optimizer was unpickled, or the model deleted).
            ValueError: a parameter is not the model's, or a plain tensor is one that the policy would compress.
                Nothing was changed then.
        """
        params = param_group["params"]
        if isinstance(params, set):
            super().add_param_group(param_group)  # raises: a set has no order
        listed = [params] if isinstance(params, Tensor) else list(params)
        param_group["params"] = listed
        tensors = [p[1] if isinstance(p, tuple) else p for p in listed]
        decided = self._decide({**self.defaults, **param_group, "params": tensors}, len(self.param_groups))
        super().add_param_group(param_group)
        self.param_groups[-1][RECORDS] = [planned.record for planned in decided]
        self.compression.records += [planned.record for planned in decided if planned.record is not None]
        self.compression.remember_plain(self.param_groups[-1:])
        self.compression.names.append([planned.layer.fqn for planned in decided])
        self.follow_backward()
        warn_of_dropped(Plan((tuple(decided),)))

    def follow_backward(self) -> None:
        """Step compressed layers in backward, or cease to, as ``compression.step_in_backward`` says."""
        if self.compression.step_in_backward:
            if self.in_backward is None:
                self.in_backward = InBackward(self)
            self.in_backward.attach()
        elif self.in_backward is not None:
            self.in_backward.detach()
            del self.in_backward

    def encode_assigned(self) -> None:
        """Verify the states of all compressed layers, and encode dense ones that were assigned to them.

        Raises:
            ValueError: see `assigned.encode_assigned`. Nothing was changed then.
        """
        encode_assigned(self)

    def forget_conversion(self) -> None:
        """Let go of everything that is kept beside the groups and states, whose records and codecs are gone."""
        self.compression.step_in_backward = False
        self.follow_backward()
        for group in self.param_groups:
            del group[RECORDS]
        del self.compression

    def state_dict(self) -> dict[str, Any]:
        """torch's state dict, loadable with ``weights_only=True``; states of DTensor parameters are DTensors.

        Raises:
            FloatingPointError: as `step` does, for the last one on an accelerator.
            ValueError: a compressed layer was assigned states that its codecs cannot take.
        """
        self.compression.judge_left_out(wait=True)
        self._bind_if_flat()
        self.encode_assigned()
        return saved.finish_state_dict(self, super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # DCP passes `state_dict` by name
        """Load a checkpoint of this optimizer, or of the same optimizer uncompressed, whose states are then encoded.

        Raises:
            ValueError: the checkpoint was written under another policy, seed, shape or format version, or is damaged.
                Nothing was changed then.
        """
        self._bind_if_flat()
        before, after = self._optimizer_load_state_dict_pre_hooks, self._optimizer_load_state_dict_post_hooks
        state_dict = state_dict.copy()
        for pre_hook in before.values():
            changed = pre_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        stock_dict, restored = saved.prepare_load(self, state_dict)
        # torch would cast our tensors to the parameter's dtype, so it gets none; hooks must see them all the same.
        self._optimizer_load_state_dict_pre_hooks = type(before)()
        self._optimizer_load_state_dict_post_hooks = type(after)()
        self._loading = True
        try:
            super().load_state_dict(stock_dict)
        finally:
            del self._loading
            self._optimizer_load_state_dict_pre_hooks = before
            self._optimizer_load_state_dict_post_hooks = after
        for param, tensors in restored:
            self.state[param] = tensors
        self.compression.bindings.clear()  # let go of the states of before
        self.compression.states_replaced()
        if self.in_backward is not None:
            self.in_backward.forget()
        for post_hook in after.values():
            post_hook(self)

    def __repr__(self) -> str:
        """torch's, without the records."""
        return "\n".join(line for line in super().__repr__().split("\n") if not line.strip().startswith(RECORDS))

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"compression": self.compression}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # torch's load_state_dict, bound before the conversion, ends here: it has cast our tensors, and checked nothing.
        if not self._loading and state.keys() == {"state", "param_groups"}:
            raise RuntimeError(
                "load_state_dict of the optimizer as it was before compress() was called, which cannot load compressed "
                "states; nothing was changed. Something kept that method: call compress() before "
                "optimizer.load_state_dict is wrapped, or take it from the optimizer anew"
            )
        if "_compression" in state:  # pickled by version 0.1
            state = {key: value for key, value in state.items() if key != "_compression"} | {
                "compression": state["_compression"]
            }
        super().__setstate__(state)

    def _patch_step_function(self) -> None:
        super()._patch_step_function()
        # Here, because copies and unpickled ones are converted, too.
        guard_foreign_steps()
        self.follow_backward()
