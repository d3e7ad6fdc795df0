"""What the documentation holds: pages, their fenced blocks, and every command in them and in help texts."""

import importlib
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from laser_dist import cli
from laser_dist.bench import BENCHMARKS
from laser_dist.recipe import TRAIN_HELP

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path
    for path in [
        *ROOT.glob("*.md"),
        *(p for top in ("laser_dist", "launchers", "ds_configs", "kernels") for p in (ROOT / top).rglob("*.md")),
    ]
    if not path.is_symlink() and path.name not in ("CHANGELOG.md",)
)
TEMPLATES = {"model_card.md"}
"""Filled in when a model is exported; its blocks are tested where that is (tests/retrieval/exporting)."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "page" in metafunc.fixturenames:
        shown = [page for page in PAGES if page.name not in TEMPLATES]
        metafunc.parametrize("page", shown, ids=[page.relative_to(ROOT).as_posix() for page in shown])


class Command(NamedTuple):
    """A command and where it stands."""

    where: str
    words: tuple[str, ...]

    @property
    def text(self) -> str:
        return shlex.join(self.words)


def blocks_of(page: Path) -> Iterator[tuple[int, str, str]]:
    """(line, language, text) of each fenced block."""
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(r"^( *)```(\w*)\n(.*?)^\1```", text, re.M | re.S):
        yield text[: match.start()].count("\n") + 1, match[2], match[3]


def words_of(line: str) -> tuple[str, ...]:
    """A shell line as words: comments go, what stands for something else gets a value."""
    line = re.sub(r"\s\((a|an|the) [^)]*\)$", "", line)  # a remark, in help texts
    line = re.sub(r"(?<= )(…|\.\.\.)(?= |$)", "recipe.toml", re.sub(r"--output (…|\.\.\.)", "--output run", line))
    words = shlex.split(line.replace("<this repository>", "repository"), comments=True)
    return tuple("2" if word == "N" else "1/2" if word == "I/N" else word for word in words)


def lines_of(text: str) -> Iterator[str]:
    yield from re.sub(r" *\\\n\s*", " ", text).splitlines()


def commands() -> list[Command]:
    """Commands of all pages, fenced, indented or inline, and of help texts."""
    found = []
    for page in PAGES:
        name = page.relative_to(ROOT).as_posix()
        text = page.read_text(encoding="utf-8")
        for number, language, body in blocks_of(page) if page.name not in TEMPLATES else ():
            is_shell = language in ("bash", "sh", "console")
            for line in lines_of(re.sub(r"\n {4,}(?=--)", " ", body)):  # a log breaks long commands without a mark
                line = line.removeprefix("$ ") if line.startswith("$ ") or is_shell else ""
                if words := words_of(line):
                    found.append(Command(f"{name}:{number}", words))
        prose = re.sub(r"^( *)```.*?^\1```", "", text, flags=re.M | re.S)
        for line in re.findall(r"^ {4}(laser-dist .*)$", prose, re.M) + re.findall(r"`(laser-dist [^`]+)`", prose):
            found.append(Command(name, words_of(" ".join(line.split()))))
    for module, text in helps():
        # Examples stand after that word, indented by two; a comment may stand between them.
        for line in lines_of(re.split(r"(?i)examples?:\n", text, maxsplit=1)[-1] if "xample" in text else ""):
            if re.match(r"  \S+.*(laser-dist|laser_dist)|  laser-dist", line) and not line.strip().startswith("#"):
                found.append(Command(module, words_of(line.strip())))
    return found


def helps() -> Iterator[tuple[str, str]]:
    """Help texts: of each command and benchmark, and the list of commands."""
    yield "laser_dist.cli", cli.usage()
    for name in [*(module for module, _ in cli.COMMANDS.values()), *BENCHMARKS.values()]:
        module = importlib.import_module(name)
        for text in {getattr(module, attribute, "") for attribute in ("HELP", "USAGE")}:
            yield name, text
    yield "laser_dist.recipe", TRAIN_HELP


@pytest.fixture(scope="session")
def documented() -> list[Command]:
    return commands()


@pytest.fixture(scope="session")
def blocks() -> Callable[[Path], Iterator[tuple[int, str, str]]]:
    return blocks_of
