"""The Hugging Face Trainer under DDP, on real gloo processes."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from lightning_sketch import SM3, BFloat16, CountSketch, Drop, Policy, RowWise, Rule
from lightning_sketch.integrations.transformers import compressed_optimizer
from tests.ranks import run_ranks_in

STEPS, SAVED_AT = 80, 60
POLICY = Policy(
    [
        Rule(role="embedding", exp_avg=BFloat16(), exp_avg_sq=CountSketch(compression=4)),
        Rule(role="softmax", exp_avg=Drop(), exp_avg_sq=RowWise(compression=4)),
        Rule(name="*.mlp.*", exp_avg=CountSketch(compression=4), exp_avg_sq=CountSketch(compression=4)),
        Rule(name="*.self_attn.*", exp_avg_sq=SM3()),
    ]
)


class WithoutNorm(Trainer):
    """The Trainer logs the norm of all gradients, which torch does not compute for sparse ones."""

    def _get_grad_norm(self, *args: object, **kwargs: object) -> None:
        return None


def make_model(sparse: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
    model.get_input_embeddings().sparse = sparse
    return model


def train_replica(sparse: bool) -> dict[str, Any]:
    """Train `STEPS` steps, and the last ones once more from a checkpoint."""
    words = torch.arange(48)[:, None] + torch.arange(6)
    args = TrainingArguments(
        f"out-{sparse}", max_steps=STEPS, per_device_train_batch_size=4, learning_rate=2e-2, logging_steps=10,
        save_strategy="steps", save_steps=SAVED_AT, disable_tqdm=True, report_to=[], use_cpu=True, ddp_backend="gloo",
        max_grad_norm=0.0 if sparse else 1.0,
    )  # fmt: skip
    seen: list[list[int]] = []

    def train(resume: str | None) -> tuple[Trainer, dict[str, Any]]:
        trainer = (WithoutNorm if sparse else Trainer)(
            make_model(sparse), args, train_dataset=[{"input_ids": x, "labels": x} for x in words],
            optimizer_cls_and_kwargs=compressed_optimizer(args, POLICY),
        )  # fmt: skip
        trainer.model.register_forward_pre_hook(
            lambda _, __, batch: seen.append(batch["input_ids"][:, 0].tolist()), with_kwargs=True
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer, {"model": trainer.model.state_dict(), "states": trainer.optimizer.state_dict()["state"]}

    trainer, end = train(None)
    _, resumed = train(f"out-{sparse}/checkpoint-{SAVED_AT}")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"processes": args.world_size, "losses": losses, "seen": seen, "end": end, "resumed": resumed}


def dense_then_sparse(rank: int, world_size: int) -> dict[str, Any]:
    # As torchrun sets them.
    os.environ.update(RANK=f"{rank}", LOCAL_RANK=f"{rank}", WORLD_SIZE=f"{world_size}", OMP_NUM_THREADS="1")
    os.environ.update(LOCAL_WORLD_SIZE=f"{world_size}", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    return {gradients: train_replica(gradients == "sparse") for gradients in ("dense", "sparse")}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    return run_ranks_in(tmp_path_factory.mktemp("ranks"), dense_then_sparse, 2)


@pytest.fixture(params=["dense", "sparse"])
def replicas(request, ranks) -> list[dict[str, Any]]:
    """What each rank of one run ended with."""
    return [rank[request.param] for rank in ranks]


@pytest.mark.distributed
def test_replicas_stay_bit_identical(replicas):
    first, *others = replicas
    assert first["processes"] == len(replicas)
    assert {float(state["step"]) for state in first["end"]["states"].values()} == {STEPS}
    for other in others:
        assert other["seen"] != first["seen"]
        torch.testing.assert_close(other["end"], first["end"], rtol=0, atol=0)


@pytest.mark.distributed
def test_replicas_resume_bit_exactly(replicas):
    for replica in replicas:
        torch.testing.assert_close(replica["resumed"], replica["end"], rtol=0, atol=0)


@pytest.mark.distributed
def test_replicas_learn(replicas):
    losses = replicas[0]["losses"]
    assert losses[-1] < 0.5 * losses[0]
