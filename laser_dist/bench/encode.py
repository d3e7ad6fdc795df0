"""`laser-dist bench encode`: LaserEncoder against sentence-transformers on the same model and the same mixed lengths.

1. The model is exported with `--self-contained` and loaded by SentenceTransformer: plain transformers, batches of 32
   sorted by length and padded. The second baseline is SentenceTransformer with this package's module, which packs too.
2. All must give the same vectors in float32; else nothing is reported.
3. They take turns, in reverse order every other round, so that a machine that slows down slows all of them.
"""

import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from laser_dist.errors import UserError
from laser_dist.files import write_json
from laser_dist.model.embedded import CACHED_BACKBONE

if TYPE_CHECKING:
    from laser_dist.retrieval.encoder import LaserEncoder

TOLERANCE = 1e-5
OURS, PADDED, PACKED = "LaserEncoder", "SentenceTransformer, padded", "SentenceTransformer, our module"
Encode = Callable[[list[str]], np.ndarray]

HELP = """Measure texts per second of LaserEncoder and of SentenceTransformer.encode on the same mixed-length passages.

Examples:
  laser-dist bench encode --layers 4
  laser-dist bench encode --model Qwen/Qwen3-0.6B --texts 4000 --dtype bfloat16 --batch-tokens 32768 --out encode.json
"""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured."""

    model: str | None = None
    """Hub id or folder of a causal LM; unset: the backbone that `laser-dist quickstart` has cached."""
    layers: int | None = None
    """Keep only the first n decoder layers."""
    texts: int = 256
    """Passages per round."""
    words: tuple[int, int] = (4, 256)
    """Shortest and longest passage; lengths between are spread evenly on a logarithmic scale."""
    batch_size: int = 32
    """Texts per batch of sentence-transformers."""
    batch_tokens: int = 4096
    """Tokens per batch of LaserEncoder."""
    steps: int = 3
    """K, the number of latent steps."""
    rounds: int = 4
    """Timed passes of each."""
    dtype: str = "float32"
    """Precision that is timed; bfloat16 and float16 need a GPU. Vectors are compared in float32 either way."""
    device: str | None = None
    """cpu, cuda, cuda:1, ...; unset: a GPU if there is one."""
    out: Path | None = None
    """Also write the result to this JSON file."""

    def validate(self) -> None:
        """Raises UserError for values that nothing could be measured with."""
        for name in ("texts", "batch_size", "batch_tokens", "steps", "rounds"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        if not 1 <= self.words[0] <= self.words[1]:
            raise UserError(f"--words {self.words[0]} {self.words[1]}: give the shortest, from 1 up, and the longest")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise UserError(f"--dtype {self.dtype}: must be float32, bfloat16 or float16")
        if self.out is not None and self.out.is_dir():
            raise UserError(f"--out {self.out}: is a folder: give the name of a file")
        if self.model is None and not (CACHED_BACKBONE / "config.json").is_file():
            raise UserError(
                f"no --model given, and {CACHED_BACKBONE} does not exist: give a hub id or a folder, "
                "or run `laser-dist quickstart` once, which makes it"
            )


@dataclass(frozen=True)
class Passed:
    """One pass over all texts. `cpu_seconds` of this process are not lengthened by other work on the machine."""

    seconds: float
    cpu_seconds: float


def main(arguments: list[str]) -> int:
    """Run the benchmark; returns the exit code. UserError: wrong input, or vectors that differ."""
    import tyro

    settings = tyro.cli(Settings, args=arguments, prog="laser-dist bench encode", description=HELP)
    settings.validate()
    from laser_dist.observability.console import quiet_libraries

    quiet_libraries()
    with tempfile.TemporaryDirectory(prefix="laser-dist-bench-") as scratch:
        encoder, encoders = load(settings, Path(scratch))
        result = measure(settings, encoder, encoders)
    _print(result)
    if settings.out is not None:
        write_json(settings.out, result)
    return 0


def load(settings: Settings, scratch: Path) -> tuple["LaserEncoder", dict[str, tuple[Any, Encode]]]:
    """Name -> (module, texts -> vectors), all in float32, on one device; the first is ours."""
    from sentence_transformers import SentenceTransformer

    from laser_dist.retrieval.encoder import LaserEncoder
    from laser_dist.retrieval.export import export
    from laser_dist.retrieval.exporting.formats import save_folder
    from laser_dist.retrieval.sentence_transformers_module import LaserModule

    encoder = LaserEncoder.from_pretrained(
        settings.model or str(CACHED_BACKBONE),
        steps=settings.steps,
        layers=settings.layers,
        dtype="float32",
        device=settings.device,
        batch_tokens=settings.batch_tokens,
    )
    if settings.dtype != "float32" and encoder.device.type == "cpu":
        raise UserError(f"--dtype {settings.dtype}: needs a GPU; CPUs are measured in float32")
    save_folder(encoder.retriever.lm, encoder.text.tokenizer, encoder.card, scratch / "model")
    export(scratch / "model", out=scratch / "export", self_contained=True)
    device = str(encoder.device)
    padded = SentenceTransformer(str(scratch / "export"), trust_remote_code=True, device=device)
    packed = SentenceTransformer(modules=[LaserModule(encoder)], device=device)

    def by_library(model: Any) -> tuple[Any, Encode]:
        return model, lambda texts: model.encode_document(
            texts, batch_size=settings.batch_size, show_progress_bar=False
        )

    return encoder, {
        OURS: (encoder.retriever, encoder.encode_passages),
        PADDED: by_library(padded),
        PACKED: by_library(packed),
    }


def measure(settings: Settings, encoder: "LaserEncoder", encoders: dict[str, tuple[Any, Encode]]) -> dict[str, Any]:
    """Compare the vectors, then time every encoder `rounds` times. UserError if the vectors differ."""
    from rich.console import Console
    from rich.progress import track

    from laser_dist.bench.environment import environment
    from laser_dist.model.backbone import DTYPES

    texts = mixed_texts(settings.texts, settings.words)
    expected = encoder.encode_passages(texts)
    for name, (_, encode) in encoders.items():
        difference = float(np.abs(encode(texts) - expected).max())
        if not difference <= TOLERANCE:
            raise UserError(
                f"{name}: its vectors are up to {difference:.1e} from LaserEncoder's, more than {TOLERANCE:g}. "
                "Encoders that compute different things are not compared, and nothing is reported"
            )
    passes: dict[str, list[Passed]] = {name: [] for name in encoders}
    for module, _ in encoders.values():
        module.to(DTYPES[settings.dtype])
    for turn in track(range(settings.rounds), "measuring", console=Console(stderr=True), transient=True):
        for name in list(encoders)[:: -1 if turn % 2 else 1]:
            passes[name].append(_timed(encoders[name][1], texts))
    prompts = encoder.text.whole_passages([_passage(text) for text in texts])
    return {
        **environment(encoder.device),
        "settings": json.loads(json.dumps(asdict(settings), default=str)),
        "model": encoder.description(),
        "tokens": sum(len(encoder.text.cut_passage(prompt)) for prompt in prompts),
        "encoders": _rows(settings, passes, on_gpu=encoder.device.type == "cuda"),
    }


def mixed_texts(count: int, words: tuple[int, int], seed: int = 0) -> list[str]:
    """`count` passages of the embedded sample's words, lengths log-uniform; the same for the same arguments."""
    from laser_dist.data import sample_folder

    lines = (sample_folder() / "corpus.jsonl").read_text(encoding="utf-8").splitlines()
    known = sorted({word for line in lines for word in json.loads(line)["text"].split()})
    rng = random.Random(seed)
    shortest, longest = map(math.log, words)
    return [" ".join(rng.choices(known, k=round(math.exp(rng.uniform(shortest, longest))))) for _ in range(count)]


def _passage(text: str) -> Any:
    from laser_dist.data.schema import Passage

    return Passage("", text)


def _timed(encode: Encode, texts: list[str]) -> Passed:
    # Vectors arrive as numpy arrays, so a GPU has finished when the call returns.
    started, cpu = time.perf_counter(), time.process_time()
    encode(texts)
    return Passed(time.perf_counter() - started, time.process_time() - cpu)


def _rows(settings: Settings, passes: dict[str, list[Passed]], *, on_gpu: bool) -> dict[str, dict[str, float]]:
    """Percentiles per encoder. The ratio is of processor time on a CPU, and of time on a GPU."""
    rows = {}
    for name, found in passes.items():
        p20, p50, p80 = np.percentile([done.seconds for done in found], [20, 50, 80]).tolist()
        cpu = float(np.median([done.cpu_seconds for done in found]))
        rows[name] = {"p20_s": p20, "p50_s": p50, "p80_s": p80, "cpu_s": cpu, "texts_per_s": settings.texts / p50}
        rows[name]["ratio"] = rows[name]["p50_s" if on_gpu else "cpu_s"] / rows[OURS]["p50_s" if on_gpu else "cpu_s"]
    return rows


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    settings = result["settings"]
    table = Table(title="Encoding the same passages of mixed length", caption_justify="left")
    for heading in ("encoder", "p20 s", "p50 s", "p80 s", "CPU s", "texts/s", "time / ours"):
        table.add_column(heading, justify="left" if heading == "encoder" else "right")
    for name, row in result["encoders"].items():
        times = [f"{row[key]:.2f}" for key in ("p20_s", "p50_s", "p80_s", "cpu_s")]
        table.add_row(name, *times, f"{row['texts_per_s']:,.1f}", f"{row['ratio']:.2f}")
    table.caption = (
        f"{result['date']} · {result['device']}, {result['threads']} threads · torch {result['torch']} · "
        f"transformers {result['transformers']}\n"
        f"{settings['model'] or CACHED_BACKBONE}, {result['model']['layers']} layers · {settings['dtype']} · "
        f"K {settings['steps']} · {settings['texts']} texts, {result['tokens']:,} tokens · batches of "
        f"{settings['batch_size']} texts, ours of {settings['batch_tokens']} tokens\n"
        f"vectors agree to {TOLERANCE:g} in float32; time / ours: of processor time on a CPU, of p50 on a GPU"
    )
    Console(width=None if sys.stdout.isatty() else 120).print(table)
