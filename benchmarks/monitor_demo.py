"""A sketch that is far too small, and a monitor that finds it out and widens it while the run goes on.

A next-word model over synthetic text whose words are as frequent as in language: word ``w`` is followed by one of a few
words of its own. Four trainings of the same model on the same batches: with exact states, with a sketch of 400 times
fewer numbers, with the same sketch and ``Monitor(on_drift="widen")``, and with ``on_drift="keep"``.

    python -m benchmarks.monitor_demo            # results/monitor_demo.json and docs/img/monitor.png
    python -m benchmarks.monitor_demo --plot     # only the last, from the JSON
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sketch import CountSketch, Monitor, Policy, Rule, compress, report
from lightning_sketch.monitor import Threshold

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).with_name("results") / "monitor_demo.json"
PICTURE = ROOT / "docs" / "img" / "monitor.png"
RUNS = ("exact", "sketch", "widen", "keep")
LABELS = {
    "exact": "exact states",
    "sketch": "a sketch that is too small",
    "widen": 'the same, Monitor(on_drift="widen")',
    "keep": 'the same, Monitor(on_drift="keep")',
}


@dataclass(frozen=True)
class Settings:
    """Options of all four trainings."""

    words: int = 4_000
    width: int = 32
    successors: int = 4  # of each word
    batch: int = 256  # words
    steps: int = 2_000
    every: int = 50  # steps between figures
    compression: float = 400.0
    lr: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    seed: int = 0


class NextWord(nn.Module):
    """A word -> scores of all words."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.words = nn.Embedding(settings.words, settings.width, sparse=True)
        self.scores = nn.Embedding(settings.words, settings.width, sparse=True)
        nn.init.normal_(self.words.weight, std=0.1)
        nn.init.zeros_(self.scores.weight)

    def forward(self, words: Tensor, candidates: Tensor) -> Tensor:
        """Words ``[batch]``, candidates ``[count]`` -> ``[batch, count]``."""
        scores: Tensor = self.words(words) @ self.scores(candidates).T
        return scores


def batch(settings: Settings, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Words and their successors, ``[batch]``, and the words that are to be told from these, ``[batch]``."""
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
    # Of rank r about as often as 1 / r.
    drawn = torch.rand(2, settings.batch, generator=generator)
    words, others = (settings.words**drawn).long().clamp_(max=settings.words) - 1
    which = torch.randint(settings.successors, (settings.batch,), generator=generator)
    return words, (words * 31 + which * 977 + 7) % settings.words, others


def train(run: str, settings: Settings) -> dict[str, Any]:
    """One training: its losses, and the figures and sizes of the states every so many steps."""
    torch.manual_seed(settings.seed)
    model = NextWord(settings)
    optimizer = torch.optim.SparseAdam(model.parameters(), lr=settings.lr, betas=settings.betas)
    monitor = Monitor(every=settings.every, on_drift=run if run in ("widen", "keep") else "log")  # type: ignore[arg-type]
    if run != "exact":
        sketch = CountSketch(compression=settings.compression)
        policy = Policy([Rule(role="embedding", exp_avg=sketch, exp_avg_sq=sketch)])
        compress(optimizer, model, policy, monitor=monitor)
    losses: list[float] = []
    figures: list[dict[str, float]] = []
    for step in range(settings.steps):
        words, targets, others = batch(settings, step)
        scores = model(words, torch.cat([targets, others]))
        loss = nn.functional.cross_entropy(scores, torch.arange(settings.batch))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(round(loss.item(), 4))
        if run != "exact" and (step + 1) % settings.every == 0:
            figures.append({"step": step + 1, "bytes": report(optimizer).state, **monitor.figures()})
    return {"losses": losses, "figures": figures, "bytes": report(optimizer).state}


def last_loss(losses: list[float], part: float = 0.1) -> float:
    """The mean of the last losses."""
    count = max(1, int(len(losses) * part))
    return sum(losses[-count:]) / count


def plot(results: dict[str, Any], path: Path) -> None:
    """Losses, the figures of one table, and bytes of the states, by step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    settings, runs = results["settings"], results["runs"]
    figure, (top, middle, bottom) = pyplot.subplots(3, 1, sharex=True, figsize=(7, 8))
    for run in RUNS:
        losses = torch.tensor(runs[run]["losses"])
        window = min(settings["every"], len(losses))
        smooth = losses.unfold(0, window, 1).mean(1)
        top.plot(range(window, len(losses) + 1), smooth, label=LABELS[run])
        steps = [x["step"] for x in runs[run]["figures"]]
        key = "optimizer_state/words.weight/exp_avg_sq_error"
        middle.plot(steps, [x.get(key, float("nan")) for x in runs[run]["figures"]])
        bottom.plot(steps, [x["bytes"] / 2**10 for x in runs[run]["figures"]])
    middle.axhline(Threshold().second_moment, color="grey", linestyle=":")
    top.set_ylabel("loss")
    top.set_ylim(top=8)  # room for the legend
    top.legend(loc="upper right", fontsize=8, ncols=2)
    middle.set_ylabel("error of exp_avg_sq")
    middle.set_yscale("log")
    bottom.set_ylabel("states, KiB")
    bottom.set_yscale("log")
    bottom.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Train, write the JSON, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", action="store_true", help="draw from the JSON")
    if not parser.parse_args().plot:
        settings = Settings()
        runs = {run: train(run, settings) for run in RUNS}
        RESULTS.write_text(json.dumps({"settings": asdict(settings), "runs": runs}) + "\n")
    results = json.loads(RESULTS.read_text())
    for run in RUNS:
        print(f"{LABELS[run]}: loss {last_loss(results['runs'][run]['losses']):.3f}")
    plot(results, PICTURE)


if __name__ == "__main__":
    main()
