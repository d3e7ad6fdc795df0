"""`laser-dist COMMAND ...`: dispatch only. Commands import what they need themselves, so that help is instant."""

import errno
import importlib
import os
import select
import sys
from collections.abc import Callable
from contextlib import suppress

from laser_dist.errors import UserError, suggest
from laser_dist.redaction import hiding, print_exception, shown

COMMANDS = {
    "doctor": (
        "laser_dist.doctor.doctor",
        "Check this machine, and a recipe, before a run: each finding with its remedy",
    ),
    "quickstart": ("laser_dist.quickstart", "Train, evaluate and export on the embedded sample set"),
    "prepare": (
        "laser_dist.data.preparation.prepare",
        "Turn rows of any kind into checked WebDataset shards",
    ),
    "annotate": ("laser_dist.data.annotation.annotate", "Write missing rationales with an OpenAI-compatible endpoint"),
    "crop": ("laser_dist.data.crop", "Make training rows of a corpus alone: random words of a passage ask for it"),
    "mine": ("laser_dist.data.mining.mine", "Find hard negatives with BM25 or an encoder"),
    "inspect": (
        "laser_dist.data.inspection.inspect",
        "Show examples as the trainer sees them, and what is odd",
    ),
    "plan": ("laser_dist.planning.cli", "Estimate memory and time of a step on given GPUs, and write a recipe"),
    "train": ("laser_dist.train", "Train a retriever from a TOML recipe"),
    "replay": ("laser_dist.guard.replay", "Run the batch of an alarm again, and say whether the anomaly comes back"),
    "launch": ("laser_dist.launch.launch", "Train on one host or many, and restart after failures"),
    "report": ("laser_dist.run_page.report", "Write a run as one HTML page: curves, time, alarms, configuration"),
    "search": ("laser_dist.retrieval.search.search", "Find the best passages of queries in an encoded corpus"),
    "evaluate": ("laser_dist.retrieval.evaluation.command", "Measure nDCG, recall and MRR on files or benchmark tasks"),
    "compare": ("laser_dist.retrieval.evaluation.compare", "Tell whether result files differ by more than chance"),
    "encode": ("laser_dist.retrieval.encode", "Encode a corpus into a memory-mapped folder of vectors"),
    "explain": ("laser_dist.retrieval.explaining.explain", "Show what a query's soft tokens say, and what they find"),
    "export": ("laser_dist.retrieval.export", "Turn a checkpoint into a plain model folder"),
    "dataset": ("laser_dist.study.datasets.command", "Make a study's dataset from its authors' files"),
    "study": ("laser_dist.study.command", "Compare methods over seeds and datasets, and write a report"),
    "bench": ("laser_dist.bench", "Measure a training step against the published one"),
}

# What is wrong with a path or a disk, and not with the program.
_OF_FILES = {
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC),
    *(errno.EDQUOT, errno.ENAMETOOLONG, errno.ELOOP, errno.EIO),
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
    return _until_the_reader_goes(lambda: _dispatch(sys.argv[1:] if arguments is None else arguments))


def _dispatch(arguments: list[str]) -> int:
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
    sys.excepthook = print_exception
    return _until_the_reader_goes(lambda: _run(module, arguments))


def _run(module: str, arguments: list[str]) -> int:
    try:
        with hiding():
            return importlib.import_module(module).main(arguments) or 0
    except UserError as error:
        print(f"error: {shown(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno not in _OF_FILES or error.filename is None or os.environ.get("LASER_DIST_TRACEBACK"):
            raise
        print(
            f"error: {error.filename}: {error.strerror}: check the path, its permissions and the room on its disk "
            "(LASER_DIST_TRACEBACK=1 shows where this came up)",
            file=sys.stderr,
        )
        return 1


def _until_the_reader_goes(act: Callable[[], int]) -> int:
    """The code of `act`; 141, as shells have it, when the reader of our output, `head` say, has seen enough."""
    try:
        try:
            code = act()
        except SystemExit:  # tyro's, after help
            _flush()
            raise
        _flush()
        return code
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        return 141


def _flush() -> None:
    """At exit, a pipe that is closed would be too late for a word about it."""
    with suppress(AttributeError, ValueError):  # closed, or none
        sys.stdout.flush()


def _reader_is_gone() -> bool:
    """Whether it was our output that broke: any other broken pipe is an error. What is left of it goes nowhere."""
    gone = False
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # closed, or not a file at all
            watched = select.poll()
            watched.register(stream.fileno(), select.POLLERR)
            if any(event & select.POLLERR for _, event in watched.poll(0)):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
                gone = True
    return gone


if __name__ == "__main__":
    sys.exit(main())
