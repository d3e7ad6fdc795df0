"""What a recipe names: is it there, and does it fit together?"""

import os
from pathlib import Path
from typing import Any

from laser_dist.doctor.finding import Context, Finding, failed, ok, skipped, warning
from laser_dist.errors import UserError
from laser_dist.reading import read_object

_NO_RECIPE = "no recipe was given"


def recipe(context: Context) -> Finding:
    if context.recipe_problem:
        return failed(context.recipe_problem, f"mend {context.recipe_name}; ready recipes are in launchers/recipes/")
    return ok(f"{context.recipe_name} can be read") if context.recipe else skipped(_NO_RECIPE)


def model(context: Context) -> Finding:
    """The folder's files, or the hub id: cached, or within reach."""
    if context.recipe is None:
        return skipped(_NO_RECIPE)
    name = context.recipe.model.name
    if not name:
        return failed("the recipe names no model", 'write name = "Qwen/Qwen3-0.6B" in [model], or give --model.name')
    folder = Path(name).expanduser()
    if folder.is_dir() or name.startswith((".", "/", "~")):
        return _model_folder(folder)
    from laser_dist.launch.facts import model_files

    if (commit := model_files(context.recipe.model)) != "not in the cache":
        return ok(f"{name} is in the hub's cache, commit {commit}")
    return _on_the_hub(name, context.recipe.model.revision)


def _model_folder(folder: Path) -> Finding:
    remedy = "give a folder with config.json, a tokenizer and safetensors, as save_pretrained writes it"
    if not folder.is_dir():
        return failed(f"{folder} does not exist", remedy)
    try:
        config = read_object(folder / "config.json")
    except (OSError, ValueError) as error:
        return failed(f"{folder}/config.json cannot be read ({error})", remedy)
    if not any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")):
        return failed(f"{folder} holds no tokenizer", remedy)
    weights = {path.name for path in folder.glob("*.safetensors")}
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            wanted = set(read_object(index)["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return failed(f"{index} cannot be read", "download the model again")
        if missing := wanted - weights:
            return failed(
                f"{folder} lacks {sorted(missing)[0]} and {len(missing) - 1} others", "download the model again"
            )
    if not weights:
        return failed(f"{folder} holds no safetensors", remedy)
    kind = config.get("model_type") if isinstance(config, dict) else None
    return ok(f"{folder}: {kind}, {len(weights)} file{'s' if len(weights) > 1 else ''} of weights")


def _on_the_hub(name: str, revision: str | None) -> Finding:
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "ON", "YES"):
        return failed(f"{name} is not in the cache, and HF_HUB_OFFLINE is set", f"unset it, and `hf download {name}`")
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(name, revision=revision, timeout=6)
    except Exception as error:  # its client raises many kinds
        said = str(error).strip().splitlines()
        return failed(
            f"{name} is not in the cache, and the hub says: {said[0][:160] if said else type(error).__name__}",
            f"check the name, the network and `hf auth login` (for models with conditions), then `hf download {name}`",
        )
    return ok(f"{name} is within reach; `hf download {name}` fetches it before the run")


def shards(context: Context) -> Finding:
    """Manifests are read, and the first shard of each set with its hash."""
    if context.recipe is None:
        return skipped(_NO_RECIPE)
    data = context.recipe.data
    if not (data.train or data.mix):
        return skipped("the recipe names no shards: give them with --data")
    from laser_dist.data.streaming.sets import open_data

    try:
        found = open_data(data)
        for part in found.sets:
            part.store.read_verified(part.shards[0])
        found.check_enough(context.recipe.train.queries_per_rank * context.recipe.train.accumulation)
    except UserError as error:
        return failed(str(error), "`laser-dist prepare --check FOLDER` names every defect")
    shards = sum(len(part.shards) for part in found.sets)
    return ok(f"{found.examples:,} examples in {shards} shards; the first of each set is as its manifest says")


def rationales(context: Context) -> Finding:
    """Examples without a rationale stop a run whose explicit view needs them."""
    if context.recipe is None or not (context.recipe.data.train or context.recipe.data.mix):
        return skipped("no recipe with shards was given")
    from laser_dist.data.streaming.sets import open_data

    try:
        lacking = open_data(context.recipe.data).without_rationale
    except UserError:
        return skipped("the shards cannot be read")
    if lacking and context.recipe.objective.needs_rationale:
        remedy = "prepare with --missing-rationale drop, `laser-dist annotate` them, or set the three weights to 0"
        return failed(f"{lacking:,} examples have no rationale, which the explicit view needs", remedy)
    return ok(f"{lacking:,} examples without a rationale, and none is needed" if lacking else "every example has one")


def ds_config(context: Context) -> Finding:
    """DeepSpeed's file, resolved as training does; without a recipe the ready-made ones."""
    from laser_dist.config import RunConfig
    from laser_dist.ds_config import resolve

    config = context.recipe or RunConfig()
    names = [context.recipe.train.deepspeed] if context.recipe else [f"zero{stage}.json" for stage in range(4)]
    try:
        tables: list[dict[str, Any]] = [resolve(name, config) for name in names]
    except UserError as error:
        return failed(
            str(error), "ds_configs/README.md explains each key; the ready-made files can be named as they are"
        )
    stages = ", ".join(str(table.get("zero_optimization", {}).get("stage", 0)) for table in tables)
    return ok(f"{', '.join(names)}: ZeRO stage {stages}")


def dev_files(context: Context) -> Finding:
    """The dev set is read as a whole."""
    if context.recipe is None:
        return skipped(_NO_RECIPE)
    files = context.recipe.evaluation
    given = [name for name in ("corpus", "queries", "qrels") if getattr(files, name)]
    if not given:
        remedy = "write corpus, queries and qrels in [evaluation]; `laser-dist prepare --dev-share 0.02` makes them"
        return warning("the recipe has no dev set: no checkpoint will be the best one", remedy)
    if len(given) < 3:
        return failed(f"[evaluation] names {', '.join(given)} only", "give corpus, queries and qrels together")
    from laser_dist.retrieval.collection import read_collection

    try:
        corpus, queries, _ = read_collection(files.corpus, files.queries, files.qrels)  # type: ignore[arg-type]
    except UserError as error:
        return failed(str(error), "mend that line; laser_dist/retrieval/README.md shows the three files")
    except OSError as error:
        return failed(f"{error.filename}: {error.strerror}", "check the three paths in [evaluation]")
    return ok(f"{len(queries):,} queries over {len(corpus):,} passages")


def output(context: Context) -> Finding:
    """Not another run's folder."""
    folder = context.output
    if folder.exists() and not folder.is_dir():
        return failed(f"{folder} is a file", "choose another --output")
    kept = sorted((folder / "checkpoints").glob("step-*")) if folder.is_dir() else []
    if kept and not (context.recipe and context.recipe.resume):
        return warning(f"{folder} holds {len(kept)} checkpoints", "continue with --resume, or choose another --output")
    return ok(f"{folder} {'is there, without checkpoints' if folder.is_dir() else 'will be made'}")
