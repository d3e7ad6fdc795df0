"""`laser-dist quickstart`: the whole path on the embedded sample set, from raw text to an exported retriever.

prepare -> evaluate the untrained model -> train through the deepspeed launcher -> evaluate -> export -> compare.
Every stage keeps what it made in the work folder; a second run reuses it.
"""

import contextlib
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from laser_dist.config import RunConfig
from laser_dist.data import sample_folder
from laser_dist.errors import UserError
from laser_dist.launch.ranks import free_port
from laser_dist.reading import read_object
from laser_dist.recipe import read_recipe, to_toml
from laser_dist.run_folder import existing_folder

RECIPE = Path(__file__).parent / "recipes" / "quickstart.toml"
HELP = """Train, evaluate and export a retriever on the embedded sample set, end to end.

Without --model the backbone is SmolLM2-135M (from a package on PyPI: no model hub needed), cut to the layers that the
recipe names. Uses every GPU present, or two CPU processes. Run it again and it reuses what is there.

Examples:
  laser-dist quickstart
  laser-dist quickstart --max-steps 100 --out runs/longer
  laser-dist quickstart --model Qwen/Qwen3-0.6B --layers 0 --out runs/qwen
"""


@dataclass(frozen=True)
class Arguments:
    """Options of the quickstart."""

    out: Path = Path("runs/quickstart")
    """Folder for shards, checkpoints, results and the export."""
    model: str | None = None
    """Hub id or folder of a causal LM; default: the embedded SmolLM2-135M."""
    layers: int | None = None
    """Decoder layers to keep; 0 keeps all. Default: what the recipe says for the embedded backbone, else all."""
    max_steps: int | None = None
    """Optimizer steps; default: the recipe's."""
    processes: int | None = None
    """Training processes; default: one per GPU, or 2 on CPU."""
    cache: Path = Path(".cache/laser_dist")
    """Where the embedded backbone is kept."""


class Stages:
    """Numbered headings with the time each stage took."""

    def __init__(self, total: int):
        from rich.console import Console

        self.console = Console(highlight=False)
        self.total, self.number, self.start, self.began = total, 0, time.monotonic(), time.monotonic()

    def begin(self, title: str) -> None:
        self.number += 1
        self.began = time.monotonic()
        self.console.print(f"\n[bold]\\[{self.number}/{self.total}] {title}[/bold]")

    def done(self, note: str) -> None:
        took = time.monotonic() - self.began
        self.console.print(f"      {note} ({took:.0f} s)", soft_wrap=True)


def main(argv: list[str]) -> int:
    """Run all stages; returns 0 when the trained model was evaluated and exported."""
    import tyro

    from laser_dist.observability.console import quiet_libraries

    arguments = tyro.cli(Arguments, args=argv, prog="laser-dist quickstart", description=HELP)
    for name, least in (("layers", 0), ("max_steps", 1), ("processes", 1)):
        if (value := getattr(arguments, name)) is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least {least}")
    if not existing_folder(arguments.out).is_dir():
        raise UserError(f"--out {arguments.out}: is a file, or lies below one: choose another folder")
    quiet_libraries()
    stages, out = Stages(6), arguments.out

    stages.begin("backbone")
    config = _config(arguments)
    kept = f", its first {config.model.layers} layers only" if config.model.layers else ""
    stages.done(config.model.name + kept)

    stages.begin("training shards from the embedded sample set")
    stages.done(_prepare(Path(config.data.train)))

    stages.begin("the untrained model on the test queries")
    before = _evaluated(config, out / "before.json", trained=False)
    stages.done(f"nDCG@10 {before['ndcg@10']:.3f}")

    stages.begin("training: deepspeed launcher, ZeRO-3")
    stages.done(_train(arguments, config, out / "recipe.toml"))

    stages.begin("the trained model on the test queries")
    after = _evaluated(config, out / "after.json", trained=True)
    stages.done(f"nDCG@10 {after['ndcg@10']:.3f}")

    stages.begin("export")
    stages.done(_export(Path(config.output), out / "model"))

    _report(stages, config, before, after, out)
    return 0


def _config(arguments: Arguments) -> RunConfig:
    """The quickstart's recipe with the paths and the backbone of this call."""
    from laser_dist.model.embedded import embedded_backbone

    recipe = read_recipe(RECIPE)
    layers = recipe.model.layers if arguments.layers is None and arguments.model is None else arguments.layers or None
    name = arguments.model or str(embedded_backbone(arguments.cache))
    sample = sample_folder()
    return replace(
        recipe,
        output=str(arguments.out / "run"),
        resume=True,
        model=replace(recipe.model, name=name, layers=layers),
        data=replace(recipe.data, train=str(arguments.out / "shards")),
        train=replace(recipe.train, max_steps=arguments.max_steps or recipe.train.max_steps),
        evaluation=replace(
            recipe.evaluation,
            corpus=str(sample / "corpus.jsonl"),
            queries=str(sample / "dev_queries.jsonl"),
            qrels=str(sample / "dev_qrels.tsv"),
        ),
    )


def _prepare(shards: Path) -> str:
    from laser_dist.data.preparation import prepare
    from laser_dist.data.shards import load_manifest

    if not (shards / "manifest.json").is_file():
        prepare.main(["--source", str(sample_folder() / "train.jsonl"), "--out", str(shards)])
    return f"{load_manifest(shards).examples} examples in {shards}"


def _evaluated(config: RunConfig, file: Path, *, trained: bool) -> dict[str, Any]:
    """Results on the test queries; read from `file` if the same model wrote them."""
    from laser_dist.files import write_json
    from laser_dist.retrieval.bm25 import bm25_run
    from laser_dist.retrieval.collection import read_collection
    from laser_dist.retrieval.encoder import LaserEncoder
    from laser_dist.retrieval.evaluation.evaluate import evaluate
    from laser_dist.retrieval.metrics import evaluate_run
    from laser_dist.run_folder import latest_checkpoint

    untrained = f"{config.model.name}, layers: {config.model.layers or 'all'}"
    model = str(latest_checkpoint(Path(config.output))) if trained else untrained
    with contextlib.suppress(OSError, ValueError):  # missing, or cut off: it is made again
        if (results := read_object(file)).get("model") == model:
            return results
    sample = sample_folder()
    corpus, queries, qrels = read_collection(sample / "corpus.jsonl", sample / "queries.jsonl", sample / "qrels.tsv")
    encoder = LaserEncoder.from_pretrained(model) if trained else LaserEncoder.from_config(config)
    metrics = evaluate(encoder, corpus, queries, qrels, progress=True).metrics
    bm25 = evaluate_run(bm25_run(corpus, queries, 100), qrels)[0]
    results = {**metrics, "bm25": bm25, "model": model}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, results)
    return results


def _train(arguments: Arguments, config: RunConfig, recipe: Path) -> str:
    import torch

    gpus = torch.cuda.device_count()
    processes = arguments.processes or gpus or 2
    recipe.write_text(to_toml(config), encoding="utf-8")
    environment = dict(os.environ)
    if not gpus:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(processes)]
    command += ["--master_port", str(free_port()), "--log_level", "error"]
    command += ["--module", "laser_dist.train", str(recipe)]
    print("      $ deepspeed " + " ".join(command[3:]), flush=True)
    if code := subprocess.run(command, env=environment).returncode:
        raise UserError(f"training ended with exit code {code} (see above); run the quickstart again to resume it")
    return f"{config.train.max_steps} steps on {processes} processes, in {config.output}"


def _export(run: Path, out: Path) -> str:
    from laser_dist.retrieval import export

    export.main([str(run), "--out", str(out), "--overwrite"])
    return str(out)


def _report(stages: Stages, config: RunConfig, before: dict, after: dict, out: Path) -> None:
    from rich.table import Table

    table = Table(title=f"Test queries of the embedded set ({config.train.max_steps} steps of training)")
    for column in ("", "nDCG@10", "recall@100", "MRR@10"):
        table.add_column(column, justify="left" if not column else "right")
    for name, results in (("BM25", before["bm25"]), ("untrained", before), ("trained", after)):
        table.add_row(name, *(f"{results[metric]:.3f}" for metric in ("ndcg@10", "recall@100", "mrr@10")))
    stages.console.print()
    stages.console.print(table)
    bin_folder = Path(sys.executable).parent
    stages.console.print(
        f"\nrecipe      {out / 'recipe.toml'}\nretriever   {out / 'model'}\n"
        f"run page    {Path(config.output) / 'run.html'}\n"
        f"curves      {bin_folder / 'tensorboard'} --logdir {out}\n"
        f"total       {(time.monotonic() - stages.start) / 60:.1f} min",
        soft_wrap=True,
    )
