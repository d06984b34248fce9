"""Train one model twice, as it is and with its optimizer state compressed, and compare.

``python examples/demo/run.py`` takes a few minutes on two cores, downloads nothing and writes
``runs/demo/results.json`` and ``runs/demo/report.png``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import corpus
import report
from rich.console import Console
from settings import FAST, Settings

HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, help=f"of each training (default {Settings.steps})")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="(default runs/demo)")
    parser.add_argument("--fast", action="store_true", help="a tiny model, to see that it runs")
    options = parser.parse_args()
    settings = FAST if options.fast else Settings()
    if options.steps:
        settings = dataclasses.replace(settings, steps=options.steps)

    started = time.perf_counter()
    console = Console()
    cache = options.out / "corpus"
    data = corpus.load(cache)
    console.print(
        f"PyTorch {data.version}'s own source: {data.files:,} files, {len(data.train):,} tokens to "
        f"learn from, {len(data.validation):,} held out, {data.vocabulary:,} distinct.\n"
        f"Two tables of {data.vocabulary:,} x {settings.dim} under SparseAdam, dense layers under "
        f"AdamW; {settings.steps:,} steps of {settings.batch_tokens:,} tokens."
    )
    console.print("\n[bold]1 of 2: as it is")
    plain = train(settings, cache, options.out / "as_it_is.json", [])
    console.print("\n[bold]2 of 2: with callbacks=[OptimizerStateCompression()]")
    compressed = train(settings, cache, options.out / "compressed.json", ["--compressed"])

    results = {
        "settings": dataclasses.asdict(settings),
        "torch": data.version,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "as_it_is": plain,
        "compressed": compressed,
    }
    (options.out / "results.json").write_text(json.dumps(results, indent=1))
    report.picture(plain, compressed, options.out / "report.png")
    console.print()
    console.print(report.table(plain, compressed))
    console.print(
        f"{options.out / 'report.png'} and results.json written; {time.perf_counter() - started:.0f} s in all."
    )


def train(settings: Settings, cache: Path, result: Path, extra: list[str]) -> report.Result:
    """Run one training in a fresh process: its peak memory is then its own.

    (Linux hands the parent's peak down to a child, so this process must stay the smaller one: it
    never imports torch.)
    """
    command = [sys.executable, str(HERE / "train.py"), settings.to_json()]
    command += ["--cache", str(cache), "--result", str(result), *extra]
    sys.stdout.flush()
    # Threads that wait by spinning are slower by 10 times where other programs use the cores too.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    code = subprocess.run(command, env=environment, check=False).returncode
    if code:  # the training has printed why
        sys.exit(code)
    loaded: report.Result = json.loads(result.read_text())
    result.unlink()  # its content goes into results.json
    return loaded


if __name__ == "__main__":
    main()
