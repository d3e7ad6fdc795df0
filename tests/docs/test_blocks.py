"""Blocks of the documentation are what they are said to be, its links lead somewhere, and every recipe loads."""

import json
import re
import tomllib
from pathlib import Path

import pytest

from laser_dist.data.schema import parse_example
from laser_dist.recipe import read_recipe

ROOT = Path(__file__).parents[2]


def test_blocks_are_what_they_are_said_to_be(page: Path, blocks, tmp_path: Path) -> None:
    """TOML is a recipe, JSON an example, Python compiles; no block is of a language that nothing checks."""
    for number, language, text in blocks(page):
        if language == "toml":
            (tmp_path / "recipe.toml").write_text(text)
            if "[methods." in text:  # a study, shown in part
                tomllib.loads(text)
            else:
                read_recipe(tmp_path / "recipe.toml")
        elif language == "json":
            dots = iter(range(100))  # "..." stands for texts, which differ
            filled = re.sub(r'"\.\.\."', lambda _, dots=dots: f'"text {next(dots)}"', text)
            parse_example(json.loads(filled), f"{page.name}:{number}")
        elif language == "python":
            compile(text, f"{page.name}:{number}", "exec")
        else:
            assert language in ("", "bash", "sh", "console"), f"{page}:{number}: {language}"


def test_links_lead_somewhere(page: Path) -> None:
    """Files and headings of this repository; addresses are left alone."""
    text = re.sub(r"^( *)```.*?^\1```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "code", text)):
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if re.match(r"[a-z]+:", target):
            continue
        is_page = file.suffix == ".md" and file.is_file()
        headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M) if is_page else []
        if not file.exists() or (anchor and anchor not in map(_anchor, headings)):
            wrong.append(target)
    assert not wrong


def _anchor(heading: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize("recipe", sorted((ROOT / "launchers/recipes").glob("*.toml")), ids=lambda path: path.name)
def test_recipes_load(recipe: Path) -> None:
    read_recipe(recipe)
