"""A monitor's figures in the log of the Hugging Face Trainer: ``Trainer(callbacks=[MonitorCallback(monitor)])``."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from lightning_sketch.monitor import Monitor


class MonitorCallback(TrainerCallback):  # type: ignore[misc]
    """Puts a monitor's figures into the Trainer's log, in the steps in which they were made.

    The Trainer calls those callbacks first that report to TensorBoard and the like, so that what is added to its log
    reaches ``trainer.state.log_history`` alone; ``reach(trainer)`` puts this one in front of them.

    Args:
        monitor: which `compressed_optimizer` or `lightning_sketch.compress` was given.
    """

    def __init__(self, monitor: Monitor) -> None:
        self.monitor = monitor
        self._logged = monitor.made

    def reach(self, trainer: Any) -> None:
        """Have the figures reach everything that the Trainer reports to. The callback need not be the Trainer's yet."""
        callbacks = trainer.callback_handler.callbacks
        callbacks[:] = [self, *(callback for callback in callbacks if callback is not self)]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a line of the log when there are figures."""
        if self.monitor.made != self._logged:
            control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Add the figures to a line of the log."""
        if logs is None or self.monitor.made == self._logged:
            return
        self._logged = self.monitor.made
        figures = self.monitor.figures()
        logs.update(figures)
        state.log_history[-1].update(figures)
