"""`laser-dist COMMAND ...`: dispatch only. Commands import what they need themselves, so that help is instant."""

import importlib
import os
import sys

from laser_dist.errors import UserError, suggest

COMMANDS = {
    "quickstart": ("laser_dist.quickstart", "Train, evaluate and export on the embedded sample set"),
    "prepare": (
        "laser_dist.data.preparation.prepare",
        "Turn rows of any kind into checked WebDataset shards",
    ),
    "annotate": ("laser_dist.data.annotation.annotate", "Write missing rationales with an OpenAI-compatible endpoint"),
    "mine": ("laser_dist.data.mining.mine", "Find hard negatives with BM25 or an encoder"),
    "inspect": (
        "laser_dist.data.inspection.inspect",
        "Show examples as the trainer sees them, and what is odd",
    ),
    "plan": ("laser_dist.planning.cli", "Estimate memory and time of a step on given GPUs, and write a recipe"),
    "train": ("laser_dist.train", "Train a retriever from a TOML recipe"),
    "launch": ("laser_dist.launch.launch", "Train on one host or many, and restart after failures"),
    "search": ("laser_dist.retrieval.search.search", "Find the best passages of queries in an encoded corpus"),
    "evaluate": ("laser_dist.retrieval.evaluation.command", "Measure nDCG, recall and MRR on files or benchmark tasks"),
    "compare": ("laser_dist.retrieval.evaluation.compare", "Tell whether result files differ by more than chance"),
    "encode": ("laser_dist.retrieval.encode", "Encode a corpus into a memory-mapped folder of vectors"),
    "explain": ("laser_dist.retrieval.explaining.explain", "Show what a query's soft tokens say, and what they find"),
    "export": ("laser_dist.retrieval.export", "Turn a checkpoint into a plain model folder"),
    "study": ("laser_dist.study.command", "Compare methods over seeds and datasets, and write a report"),
    "bench": ("laser_dist.bench", "Measure a training step against the published one"),
}


def usage() -> str:
    rows = "\n".join(f"  {name:<11} {help_}" for name, (_, help_) in COMMANDS.items())
    return (
        f"usage: laser-dist COMMAND ...\n\ncommands:\n{rows}\n\n"
        "examples:\n"
        "  laser-dist quickstart\n"
        "  laser-dist prepare --source train.jsonl --out shards/\n"
        "  laser-dist train recipe.toml --output runs/first --optimizer.learning-rate 2e-4\n"
        "  laser-dist COMMAND --help\n"
    )


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code. A UserError is printed as one message, without a traceback."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from laser_dist import __version__

        print(f"laser-dist {__version__}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        print(f'laser-dist: unknown command "{name}".{suggest(name, COMMANDS)}\n\n{usage()}', file=sys.stderr)
        return 2
    return run(COMMANDS[name][0], rest)


def run(module: str, arguments: list[str]) -> int:
    """Call `module.main(arguments)`; user errors and Ctrl-C end in a message and a code, not in a traceback."""
    try:
        return importlib.import_module(module).main(arguments) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return _end_of_pipe()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _end_of_pipe() -> int:
    """Nothing to tell when the reader of our output, `head` say, has seen enough; any other broken pipe is an error."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is flushed at exit goes there
        return 141
    raise


if __name__ == "__main__":
    sys.exit(main())
