"""Accelerate with FSDP2: every process holds its part of each parameter, and that part's compressed states.

torchrun --standalone --nproc_per_node 2 examples/accelerate_fsdp2.py
"""

from __future__ import annotations

import re
import tempfile
from pydoc_data.topics import topics

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_sketch import Drop, Factored, Policy, Rule, compress, report

POLICY = Policy(
    [Rule(role=("embedding", "softmax"), exp_avg=Drop(), exp_avg_sq=Factored(floor=1.0))],
    role_hints={"head.weight": "softmax"},  # a plain nn.Linear
)


class LanguageModel(nn.Module):
    def __init__(self, vocabulary: int, dim: int = 48) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, dim)
        self.lstm = nn.LSTM(dim, dim, batch_first=True)
        self.head = nn.Linear(dim, vocabulary)

    def forward(self, words: Tensor) -> Tensor:
        """Loss of predicting each word of words [batch, length] from those before it."""
        scores = self.head(self.lstm(self.embedding(words[:, :-1]))[0])
        return nn.functional.cross_entropy(scores.flatten(0, 1), words[:, 1:].flatten())


def start() -> Accelerator:
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT")
    if torch.cuda.is_available():
        return Accelerator(fsdp_plugin=plugin)
    plugin.cpu_ram_efficient_loading = False
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    # Accelerate turns FSDP on where there are GPUs. This is what it does there; leave it out of your own script.
    PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    return accelerator


def main() -> None:
    tokens = re.findall(r"\w+|[^\w\s]", " ".join(topics.values()).lower())
    ids = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    text = torch.tensor([ids[token] for token in tokens])
    data = DataLoader(text[: len(text) // 17 * 17].view(-1, 17), batch_size=64, shuffle=True)

    accelerator = start()
    torch.manual_seed(0)
    model = LanguageModel(len(ids))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer = compress(optimizer, model, POLICY)  # the one line, before prepare
    model, optimizer, data = accelerator.prepare(model, optimizer, data)

    losses: list[float] = []
    for words in data:
        loss = model(words)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if len(losses) % 20 == 0:
            accelerator.print(f"batch {len(losses)}: loss {sum(losses[-20:]) / 20:.3f}")

    with tempfile.TemporaryDirectory() as local:
        folder = accelerator.gather_for_metrics([local], use_gather_object=True)[0]  # rank zero's
        before = model(words).item()
        accelerator.save_state(folder)
        with torch.no_grad():
            for param in model.parameters():
                param.zero_()
        accelerator.load_state(folder)
        assert model(words).item() == before
        accelerator.wait_for_everyone()

    measured = report(optimizer)
    print(
        f"rank {accelerator.process_index}: {measured.state:,} bytes of states "
        f"for {measured.parameters:,} of parameters"
    )
    accelerator.print(measured)


if __name__ == "__main__":
    main()
