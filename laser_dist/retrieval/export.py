"""`laser-dist export`: a checkpoint as one plain model folder, which needs nothing of ours to load.

The folder: full weights (LoRA merged in float32) and config.json of the backbone's own architecture, or the adapters
alone; the tokenizer with its chat template, laser_dist.json (see `card`), modules.json and
config_sentence_transformers.json, and a README.md. Every checkpoint, of any ZeRO stage, holds whole weights in model/,
so no sharded state is read here.

It is written under a temporary name beside the target, loaded again and compared with the source, and then renamed:
what bears the target's name is complete and gives the checkpoint's vectors.
"""

import gc
import re
from dataclasses import dataclass
from pathlib import Path

from laser_dist.errors import UserError
from laser_dist.retrieval.exporting import formats, weights
from laser_dist.retrieval.exporting.model_card import write_model_card
from laser_dist.retrieval.exporting.origin import origin_of
from laser_dist.retrieval.exporting.target import check_space, check_target, find_source, staged
from laser_dist.retrieval.exporting.weights import TOLERANCE, Dtype

__all__ = ["TOLERANCE", "Export", "export", "main"]

HELP = """Turn a checkpoint into one plain model folder, for laser_dist, transformers, PEFT and sentence-transformers.

LoRA adapters are merged, unless --adapter asks for them alone. The export is loaded again and compared with the
checkpoint before it gets its name.

Examples:
  laser-dist export runs/first --out exports/first
  laser-dist export runs/first/checkpoints/step-000020 --out exports/step20 --dtype bfloat16
  laser-dist export runs/first --out exports/first --results nq.json scifact.json --overwrite
  laser-dist export runs/first --out exports/alone --self-contained
  laser-dist export runs/lora --out exports/adapters --adapter
"""


@dataclass(frozen=True)
class Export:
    """A finished export."""

    folder: Path
    dtype: str
    """Of full weights; adapters alone stay as they were."""
    rounding: float
    """Largest change of a probe vector's component by the export's precision; 0 where nothing was rounded."""


def export(
    checkpoint: Path,
    /,
    *,
    out: Path,
    dtype: Dtype = "keep",
    adapter: bool = False,
    self_contained: bool = False,
    max_shard_size: str = "5GB",
    results: tuple[Path, ...] = (),
    overwrite: bool = False,
) -> Export:
    """Write the model of a checkpoint to the folder `out`, verified.

    Raises UserError for a source that is no model or was altered, a target that holds something else or has no room,
    weights that overflow `dtype`, and an export that does not give the checkpoint's vectors.

    Args:
        checkpoint: A run (its newest checkpoint), a checkpoint, or a model folder.
        out: Folder to write; must be new or empty.
        dtype: Precision of the weights; keep: as they are stored (merged adapters: as the backbone's).
        adapter: Write LoRA adapters alone, as they are stored; who loads them needs the backbone.
        self_contained: Bring the model's code along, one readable file: no laser_dist is needed to load it.
        max_shard_size: Largest weight file, e.g. 500MB or 5GB.
        results: Files written by `laser-dist evaluate --out`, for the model card; a file's name is the data set's.
        overwrite: Replace an earlier export in that folder.
    """
    from rich.console import Console

    source, out = find_source(checkpoint), Path(out).expanduser().resolve()
    check_target(out, overwrite)
    _check_options(source, dtype, adapter, self_contained, max_shard_size)
    origin = origin_of(source, results)
    target, computed = weights.target_dtype(source, dtype)
    with Console(stderr=True).status(f"loading {source}") as status, staged(out) as staging:
        encoder, exact = weights.load(source, computed)
        status.update(f"writing {out}")
        if adapter:
            weights.write_adapters(encoder, source, staging)
            written = exact
        else:
            check_space(out, weights.size(encoder, target))
            written = weights.write_model(encoder, staging, target, max_shard_size)
        formats.write_sentence_transformers(encoder.card, staging, self_contained=self_contained)
        if self_contained:
            formats.write_shipped_module(staging)
        write_model_card(
            encoder, origin, staging, name=out.name, dtype=target, adapter=adapter, self_contained=self_contained
        )
        # Two copies of a large model may not fit into memory, and modules refer to each other in circles.
        del encoder
        gc.collect()
        status.update("loading it again, to compare")
        weights.verify(staging, written, computed)
    return Export(out, target, float(abs(written - exact).max()))


def main(argv: list[str]) -> int:
    """Run the command; returns the exit code."""
    import tyro

    done = tyro.cli(export, args=argv, prog="laser-dist export", description=HELP)
    rounded = f"; rounding to {done.dtype} moved a probe vector by at most {done.rounding:.1e}" if done.rounding else ""
    form = "as adapters" if weights.has_adapters(done.folder) else f"in {done.dtype}"
    print(f"exported to {done.folder} {form}, and verified against the checkpoint{rounded}")
    return 0


def _check_options(source: Path, dtype: str, adapter: bool, self_contained: bool, max_shard_size: str) -> None:
    if adapter and not weights.has_adapters(source):
        raise UserError(f"--adapter: {source} holds full weights and no adapters; leave the flag out")
    if adapter and dtype != "keep":
        raise UserError(f"--dtype {dtype}: adapters are exported as they are stored; leave it out, or --adapter")
    if adapter and self_contained:
        raise UserError("--self-contained needs the full weights in the folder; leave out --adapter")
    if not re.fullmatch(r"[1-9]\d*(\.\d+)?[KMGT]B", max_shard_size):
        raise UserError(f"--max-shard-size {max_shard_size}: write a number and KB, MB, GB or TB, e.g. 500MB")
