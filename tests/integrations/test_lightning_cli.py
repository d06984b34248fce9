"""LightningCLI builds the callback from YAML."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.cli import LightningCLI

from lightning_sketch import SM3, BFloat16, Policy, Rule
from lightning_sketch.integrations.lightning import OptimizerStateCompression
from lightning_sketch.monitor import Threshold
from tests.integrations.lightning_tools import Tiny, adamw, batches

RULES = [
    {"role": "embedding", "min_rows": 10, "exp_avg": "BFloat16", "exp_avg_sq": {"codec": "SM3", "variant": "I"}},
    {"name": ["head.*"], "exp_avg": "Keep"},
]


class Model(Tiny):
    """Without arguments, as the command line makes it."""

    def __init__(self):
        super().__init__(adamw)


def write_config(**callback_arguments):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    callback = {"class_path": "lightning_sketch.OptimizerStateCompression", "init_args": callback_arguments}
    trainer = {"accelerator": "cpu", "devices": 1, "logger": False, "max_steps": 3, "callbacks": [callback]}
    Path("config.yaml").write_text(yaml.safe_dump({"trainer": trainer | quiet}))


def fit(*arguments):
    """Run the command line on ``config.yaml``; return the callback and the trainer."""
    options = {"run": False, "save_config_callback": None}
    cli = LightningCLI(Model, args=["--config", "config.yaml", *arguments], **options)
    cli.trainer.fit(cli.model, batches())
    (callback,) = (c for c in cli.trainer.callbacks if isinstance(c, OptimizerStateCompression))
    return callback, cli.trainer


@pytest.mark.parametrize("form", ["nested", "path"])
def test_a_policy_in_the_configuration(form):
    written = {"rules": RULES, "seed": 3}
    Path("policy.yaml").write_text(yaml.safe_dump(written))
    write_config(policy=written if form == "nested" else "policy.yaml")
    callback, trainer = fit()
    embedding = Rule(role="embedding", min_rows=10, exp_avg=BFloat16(), exp_avg_sq=SM3(variant="I"))
    assert callback.policy == Policy([embedding, RULES[1]], seed=3)
    assert "exp_avg_sq_dim0" in trainer.optimizers[0].state[trainer.lightning_module.table.weight]


def test_the_other_arguments():
    write_config(policy={"rules": RULES}, nonfinite="skip", log_memory=False)
    callback, _ = fit()
    assert (callback.nonfinite, callback.log_memory) == ("skip", False)


def test_a_monitor_in_the_configuration():
    options = {"every": 2, "on_drift": "warn", "threshold": {"cosine": 0.7}}
    monitor = {"class_path": "lightning_sketch.Monitor", "init_args": options}
    write_config(policy={"rules": RULES}, monitor=monitor)
    callback, _ = fit()
    assert (callback.monitor.made, callback.monitor.threshold) == (1, Threshold(cosine=0.7))


def test_the_default_policy(caplog):
    write_config()
    fit()
    assert "nothing is compressed" in caplog.text  # the tiny table is too small for it


def test_allow_empty_from_the_command_line():
    write_config(policy={"rules": [{"role": "embedding", "min_rows": 1000, "exp_avg": "Drop", "optional": True}]})
    with pytest.raises(ValueError, match="compresses nothing"):
        fit()
    callback, _ = fit("--trainer.callbacks.allow_empty=true")
    assert callback.allow_empty


def test_an_optimizer_from_the_command_line_is_compressed_too():
    write_config(policy={"rules": [{"role": "embedding", "sum": "SM3"}]})
    _, trainer = fit("--optimizer", "torch.optim.Adagrad")  # bitsandbytes has one, too
    assert type(trainer.optimizers[0]).__qualname__ == "CompressedAdagrad"
    assert "sum_dim0" in trainer.optimizers[0].state[trainer.lightning_module.table.weight]


def test_the_saved_configuration_builds_the_same_callback():
    write_config(policy={"rules": RULES, "seed": 3})
    first, _ = fit()
    cli = LightningCLI(Model, args=["--config", "config.yaml"], run=False, save_config_callback=None)
    Path("config.yaml").write_text(cli.parser.dump(cli.config))
    second, _ = fit()
    assert second.policy == first.policy


def test_pytorch_lightning_alone_is_enough_and_without_either_package_the_error_says_so():
    write_config(policy={"rules": [{"name": "layer.weight", "second_moment": "RowWise"}]})
    script = """if True:
        import sys
        sys.modules["lightning"] = sys.modules["pytorch_lightning"] = None  # as if not installed
        try:
            from lightning_sketch import OptimizerStateCompression
        except ImportError as error:
            assert "pip install lightning" in str(error)
        else:
            raise AssertionError
        del sys.modules["pytorch_lightning"]
        from pytorch_lightning.cli import LightningCLI
        from pytorch_lightning.demos.boring_classes import BoringModel
        arguments = ["fit", "--config", "config.yaml", "--optimizer", "Adam"]
        cli = LightningCLI(BoringModel, args=arguments, save_config_callback=None)
        assert "exp_avg_sq_row" in cli.trainer.optimizers[0].state[cli.model.layer.weight]
    """
    subprocess.run([sys.executable, "-c", script], check=True)
