"""`laser-dist plan --all`: every known model on a few kinds of machines, as a table and as recipes."""

from pathlib import Path

from laser_dist.planning.job import GPUS, Job
from laser_dist.planning.options import Option, fastest, nearest, options_of, seconds
from laser_dist.planning.recipe import check_recipe, recipe_text
from laser_dist.planning.shapes import KNOWN, Shape

# Name -> GPUs per node, nodes, kind.
MACHINES = {
    "1x24gb": (1, 1, "rtx4090"),
    "1x80gb": (1, 1, "h100"),
    "8x80gb": (8, 1, "h100"),
    "64x80gb": (8, 8, "h100"),
}
MODES = {"lora": 64, "full": 0}
# What launchers/recipes/ has ready; the table there names the command for every other cell.
CHECKED_IN = (
    "smollm2-135m-full-1x24gb",
    "qwen3-0.6b-lora-1x24gb",
    "qwen3-0.6b-full-8x80gb",
    "llama-3.2-1b-lora-1x24gb",
    "llama-3.2-3b-full-8x80gb",
    "qwen3-4b-lora-1x80gb",
    "qwen3-4b-full-8x80gb",
    "qwen3-8b-lora-1x24gb",
    "qwen3-8b-lora-8x80gb",
    "qwen3-8b-full-8x80gb",
    "llama-3.1-8b-full-64x80gb",
    "qwen3-14b-full-64x80gb",
    "qwen3-32b-lora-8x80gb",
    "llama-3.1-70b-lora-8x80gb",
    "llama-3.1-70b-full-64x80gb",
)
_HEAD = """# Recipes

`quickstart.toml`, `crops.toml`, `qwen3-0.6b.toml` and `qwen3-8b.toml` are written by hand. All others are written by

    laser-dist plan --all --out launchers/recipes

and so is this table; a test compares them with what the plan says today. Each cell: the ZeRO configuration, how
activations are recomputed (ck: activation checkpointing; gc N: GradCache in chunks of N tokens), estimated GiB per GPU,
and seconds per step of 8 queries per GPU with all texts at their longest (512 tokens; 1,024 with the rationale).
**Bold: the recipe is in this folder.** For any other cell, and for other batches and lengths:

    laser-dist plan --model MODEL --lora-rank 64 --gpus 8 --nodes 8 --gpu h100 --out plan/      # 0: full fine-tuning

1x24gb is an RTX 4090, the others are H100s, 64 of them in 8 nodes. Memory follows formulas that tests hold to counted
bytes; times come from data sheets and estimates, and **no recipe here has run on a GPU yet**. Where weights or states
are offloaded, look at the host's memory too, which the plan prints.

"""


def plan_cell(shape: Shape, mode: str, machine: str) -> list[Option]:
    """All options of one cell of the table."""
    gpus, nodes, gpu = MACHINES[machine]
    return options_of(Job(shape=shape, hardware=GPUS[gpu], gpus=gpus, nodes=nodes, lora_rank=MODES[mode]))


def files() -> dict[str, str]:
    """Name -> content of all that is generated: README.md, and one TOML per cell that is checked in."""
    rows, made = [], {}
    for key, shape in KNOWN.items():
        for mode in MODES:
            cells = []
            for machine in MACHINES:
                name, options = f"{key}-{mode}-{machine}", plan_cell(shape, mode, machine)
                chosen = fastest(options)
                cells.append(_cell(chosen or nearest(options), name in CHECKED_IN))
                if chosen:
                    made[f"{name}.toml"] = recipe_text(chosen, chosen.job.strategy.name, _command(key, mode, machine))
            rows.append(f"| {key} | {mode} | " + " | ".join(cells) + " |")
    table = [f"| model | train | {' | '.join(MACHINES)} |", "|---" * (len(MACHINES) + 2) + "|", *rows]
    return {"README.md": _HEAD + "\n".join(table) + "\n"} | made


def checked_in() -> dict[str, str]:
    """What launchers/recipes/ has of `files`."""
    return {name: text for name, text in files().items() if name == "README.md" or name[:-5] in CHECKED_IN}


def write_catalogue(folder: Path, everything: bool) -> None:
    """Write the table and the recipes, all that fit or those that are checked in, each read back as training does."""
    from laser_dist.planning.cli import write_text

    made = files() if everything else checked_in()
    for name, text in made.items():
        write_text(folder / name, text)
        if name.endswith(".toml"):
            check_recipe(folder / name)
    print(f"wrote {len(made) - 1} recipes and README.md to {folder}")


def _command(key: str, mode: str, machine: str) -> str:
    gpus, nodes, gpu = MACHINES[machine]
    spread = f" --nodes {nodes}" if nodes > 1 else ""
    return f"laser-dist plan --model {KNOWN[key].name} --lora-rank {MODES[mode]} --gpus {gpus}{spread} --gpu {gpu}"


def _cell(option: Option, ready: bool) -> str:
    if not option.fits:
        return f"no: {option.verdict}"
    job = option.job
    how = [job.strategy.name, *["ck"] * job.checkpointing, *[f"gc {job.chunk_tokens}"] * (job.chunks > 1)]
    text = f"{', '.join(how)}, {option.memory.peak / 2**30:.0f} GiB, {seconds(option)} s"
    return f"**{text}**" if ready else text
