"""The Hugging Face Trainer under FSDP2 and DeepSpeed's ZeRO on real ranks: it trains, saves and resumes bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from lightning_sketch import SM3, BFloat16, CountSketch, Drop, Policy, RowWise, Rule, report
from lightning_sketch.integrations.transformers import MovesStates, compressed_optimizer
from lightning_sketch.rules.inside import unwrap
from lightning_sketch.sharding import local
from tests.deepspeed_tools import config, init_deepspeed
from tests.ranks import run_ranks_in
from tests.tiny import assert_same

pytestmark = pytest.mark.distributed

WORLD, OTHER_WORLD = 2, 3
STEPS, SAVED_AT = 8, 5
VOCABULARY = 65  # 33 and 32 rows
POLICY = Policy(
    [
        Rule(role="embedding", exp_avg=BFloat16(), exp_avg_sq=CountSketch(compression=4)),
        Rule(role="softmax", exp_avg=Drop(), exp_avg_sq=RowWise(compression=4)),
        Rule(name="*.mlp.*", exp_avg=CountSketch(compression=4), exp_avg_sq=CountSketch(compression=4)),
        Rule(name="*.self_attn.*", exp_avg_sq=SM3()),
    ]
)


@dataclass(frozen=True)
class Case:
    """One engine: a ZeRO stage, or FSDP2 with a kind of checkpoint."""

    stage: int | None = None
    state_dict: str = ""
    bf16: bool = False

    def __str__(self) -> str:
        return f"ZeRO-{self.stage}{' bf16' * self.bf16}" if self.stage else f"FSDP2 {self.state_dict}"


FSDP2 = [Case(state_dict=kind) for kind in ("FULL_STATE_DICT", "SHARDED_STATE_DICT")]
ZERO = [*(Case(stage) for stage in (1, 2, 3)), Case(3, bf16=True)]
CASES = [*FSDP2, *ZERO]


class OnCPU(MovesStates, Trainer):
    """Accelerate turns FSDP on where there are GPUs or the like; this is what it does there, and all it does."""

    def create_accelerator_and_postprocess(self) -> None:
        from accelerate import FullyShardedDataParallelPlugin, PartialState
        from accelerate.utils import DistributedType

        super().create_accelerator_and_postprocess()
        if self.args.fsdp_plugin_args is not None:
            state = self.accelerator.state
            PartialState().distributed_type = state.distributed_type = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = True


def llama(seed: int) -> nn.Module:
    """Has dropout, so a resumed run needs its random state."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, attention_dropout=0.1, **sizes))


def arguments(case: Case, out: str) -> TrainingArguments:
    if case.stage is None:
        engine: dict[str, Any] = {"fsdp": True, "fsdp_config": {"state_dict_type": case.state_dict}}
    else:
        auto = {"gradient_clipping": "auto", "train_micro_batch_size_per_gpu": "auto"}
        engine = {"deepspeed": config(case.stage, "bf16" if case.bf16 else "fp32", auto), "bf16": case.bf16}
    return TrainingArguments(
        out, max_steps=STEPS, per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1, use_cpu=True,
        save_strategy="steps", save_steps=SAVED_AT, disable_tqdm=True, report_to=[], ddp_backend="gloo", **engine,
    )  # fmt: skip


def data() -> list[dict[str, Tensor]]:
    words = torch.arange(48)[:, None] + torch.arange(6)
    return [{"input_ids": sentence, "labels": sentence} for sentence in words]


def fit(case: Case, policy: Policy | None, out: str, resume: str | None = None, seed: int = 0) -> dict[str, Any]:
    """Train, or the rest of it from the checkpoint in the folder `resume`."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)  # Accelerate keeps its state in the classes
    GradientState._reset_state()
    args = arguments(case, out)
    options = {} if policy is None else {"optimizer_cls_and_kwargs": compressed_optimizer(args, policy)}
    trainer = OnCPU(llama(seed), args, train_dataset=data(), **options)
    watch = Watch()
    trainer.add_callback(watch)
    trainer.train(resume_from_checkpoint=None if resume is None else f"{resume}/checkpoint-{SAVED_AT}")
    bytes_ = report(trainer.optimizer)
    return {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "start": watch.start,
        "end": held(unwrap(trainer.optimizer)),
        "class": type(unwrap(trainer.optimizer)).__qualname__,
        "saved": bytes_.dense_state / bytes_.state,
        "errors": {fqn: dict(errors) for fqn, errors in bytes_.conversion_errors.items()},
    }


class Watch(TrainerCallback):
    """Keep what training starts from."""

    def on_train_begin(self, args, state, control, optimizer=None, **_):
        self.start = held(unwrap(optimizer))


def held(optimizer: Any) -> dict[str, Any]:
    """What this rank's optimizer steps and keeps, copied; under ZeRO its flat tensors."""
    if hasattr(optimizer, "all_tensors"):
        tensors = [tensor for tensor, _ in optimizer.all_tensors()]
    else:
        tensors = [param for group in optimizer.param_groups for param in group["params"]]
    found: dict[str, Any] = {"lrs": [float(group["lr"]) for group in optimizer.param_groups]}
    for number, tensor in enumerate(tensors):
        found[f"{number}"] = local(tensor).detach().clone()
        for key, value in optimizer.state.get(tensor, {}).items():
            found[f"{number}.{key}"] = local(value).clone() if isinstance(value, Tensor) else value
    return found


def refusal(case: Case) -> str:
    """What is said of an optimizer in DeepSpeed's configuration."""
    args = arguments(case, "refused")
    args.deepspeed_plugin.hf_ds_config.config["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-3}}
    try:
        compressed_optimizer(args, POLICY)
    except ValueError as error:
        return str(error)
    return "accepted"


def every_case(rank: int, world_size: int) -> dict[str, Any]:
    init_deepspeed(rank, world_size)
    found: dict[str, Any] = {}
    for case in FSDP2:  # first: after arguments with DeepSpeed's configuration, Accelerate takes it for all
        found[f"{case}, plain"] = fit(case, None, f"{case}, plain")
        found[f"{case}, joined"] = fit(case, POLICY, f"{case}, joined", f"{case}, plain", seed=1)
    for case in CASES:
        found[f"{case}"] = fit(case, POLICY, f"{case}")
        found[f"{case}, resumed"] = fit(case, POLICY, f"{case}, resumed", f"{case}", seed=1)
    return found | {"refused": refusal(ZERO[1])}


def on_other_ranks(rank: int, world_size: int) -> dict[str, Any]:
    """Resume what another number of ranks saved."""
    init_deepspeed(rank, world_size)  # for the variables that torchrun sets
    return {f"{case}": fit(case, POLICY, f"{case}, {world_size} ranks", f"{case}", seed=1) for case in FSDP2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def ranks(folder) -> list[dict[str, Any]]:
    return run_ranks_in(folder, every_case, WORLD)


@pytest.fixture(scope="module")
def other_ranks(ranks, folder) -> list[dict[str, Any]]:
    return run_ranks_in(folder, on_other_ranks, OTHER_WORLD)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_compressed_optimizer_trains(ranks, case):
    for rank in ranks:
        found = rank[f"{case}"]
        assert found["class"] == "CompressedAdamW"
        assert found["saved"] > 1.5
        plain = rank[f"{FSDP2[0]}, plain"]["losses"]
        assert found["losses"] == pytest.approx(plain, rel=0.1)
        assert found["losses"] != plain
        assert len(found["losses"]) == STEPS


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_resumed_run_is_the_undisturbed_one(ranks, case):
    for rank in ranks:
        undisturbed, resumed = rank[f"{case}"], rank[f"{case}, resumed"]
        assert resumed["losses"] == undisturbed["losses"]  # the first are from the checkpoint's own log
        assert_same(resumed["end"], undisturbed["end"])
        assert not torch.equal(resumed["start"]["0"], resumed["end"]["0"])
    assert len(ranks[0][f"{case}"]["end"]) > 20


@pytest.mark.parametrize("case", FSDP2, ids=str)
def test_a_plain_checkpoint_is_resumed_compressed(ranks, case):
    for rank in ranks:
        plain, joined = rank[f"{case}, plain"], rank[f"{case}, joined"]
        assert (plain["class"], joined["class"]) == ("AdamW", "CompressedAdamW")
        assert joined["losses"][: SAVED_AT + 1] == plain["losses"][: SAVED_AT + 1], "the same weights"
        assert joined["losses"] == pytest.approx(plain["losses"], rel=0.1)
        assert 0 < joined["errors"]["model.embed_tokens.weight"]["exp_avg"] < 0.01


@pytest.mark.parametrize("case", FSDP2, ids=str)
def test_a_checkpoint_is_resumed_on_another_number_of_ranks(ranks, other_ranks, case):
    table = "0"  # model.embed_tokens.weight: a first moment in bfloat16, by rows
    whole, moved = (
        {key: torch.cat([rank[f"{case}{name}"]["start"][key] for rank in group]) for key in (table, f"{table}.exp_avg")}
        for name, group in ((", resumed", ranks), ("", other_ranks))
    )
    assert_same(moved, whole)
    for rank in other_ranks:
        start = rank[f"{case}"]["start"]
        assert start["lrs"] == ranks[0][f"{case}, resumed"]["start"]["lrs"]
        assert start[f"{table}.step"] == SAVED_AT
        assert start[f"{table}.exp_avg_sq_table"].any()
        assert len(rank[f"{case}"]["losses"]) == STEPS


def test_an_optimizer_in_the_configuration_of_deepspeed_is_refused(ranks):
    for rank in ranks:
        assert rank["refused"].startswith('DeepSpeed\'s configuration has an "optimizer", which the Trainer takes')
