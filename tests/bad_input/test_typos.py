"""Single-edit typing errors, generated: the message suggests the right key for at least nine of ten."""

import dataclasses
import random
import re
from typing import get_type_hints

import pytest

from laser_dist.cli import COMMANDS
from laser_dist.config import RunConfig
from laser_dist.ds_config import KNOWN, KNOWN_WITHIN, OWNED, resolve
from laser_dist.errors import UserError
from laser_dist.recipe import read_recipe
from laser_dist.testing.hostile import Ended, command

LETTERS = "abcdefghijklmnopqrstuvwxyz_"
SECTIONS = {name: kind for name, kind in get_type_hints(RunConfig).items() if dataclasses.is_dataclass(kind)}
KEYS = [f"{section}.{key}" for section, kind in SECTIONS.items() for key in get_type_hints(kind)]
KEYS += [key for key in get_type_hints(RunConfig) if key not in SECTIONS]


def typo(word: str, rng: random.Random) -> str:
    """The word with one letter more, less, other, or two in the wrong order; its first letter stays."""
    while True:
        place, kind = rng.randrange(1, len(word)), rng.choice(("insert", "delete", "replace", "transpose"))
        letter = rng.choice(LETTERS)
        made = {
            "insert": word[:place] + letter + word[place:],
            "delete": word[:place] + word[place + 1 :],
            "replace": word[:place] + letter + word[place + 1 :],
            "transpose": word[: place - 1] + word[place] + word[place - 1] + word[place + 1 :],
        }[kind]
        if made != word and made[0] == word[0] and re.fullmatch(r"[a-z][\w-]*\w", made):
            return made


def share(found: dict[str, str]) -> float:
    """Of typing errors whose message (the value) suggests what was meant (before the blank of the key)."""
    missed = [key for key, said in found.items() if f'"{key.split()[0]}"' not in said.partition("Did you mean")[2]]
    print(f"{len(found) - len(missed)} of {len(found)} answered; not: {missed[:10]}")
    return 1 - len(missed) / len(found)


def test_keys_of_a_recipe(tmp_path):
    rng, found = random.Random(1), {}
    for key in KEYS:
        section, _, name = key.rpartition(".")
        for _ in range(4):
            wrong = typo(name, rng)
            if wrong in get_type_hints(SECTIONS.get(section, RunConfig)):
                continue
            (tmp_path / "recipe.toml").write_text(f"[{section}]\n{wrong} = 1\n" if section else f"{wrong} = 1\n")
            with pytest.raises(UserError) as error:
                read_recipe(tmp_path / "recipe.toml")
            found[f"{name} {section}.{wrong}"] = str(error.value)
    assert len(found) > 300 and share(found) >= 0.9


def test_sections_of_a_recipe(tmp_path):
    rng, found = random.Random(2), {}
    for section in SECTIONS:
        for _ in range(8):
            wrong = typo(section, rng)
            (tmp_path / "recipe.toml").write_text(f"[{wrong}]\n")
            with pytest.raises(UserError) as error:
                read_recipe(tmp_path / "recipe.toml")
            found[f"{section} {wrong}"] = str(error.value)
    assert share(found) >= 0.9


def test_keys_of_a_deepspeed_config(tmp_path):
    import json

    rng, found = random.Random(3), {}
    known = [("", key) for key in sorted(KNOWN)] + [(s, k) for s, keys in KNOWN_WITHIN.items() for k in sorted(keys)]
    for section, key in known:
        for _ in range(3):
            wrong = typo(key, rng)
            table: dict = {wrong: 1}
            if wrong in KNOWN_WITHIN.get(section, KNOWN):
                continue
            for name in reversed(section.split(".") if section else []):
                table = {name: table}
            (tmp_path / "ds.json").write_text(json.dumps(table))
            with pytest.raises(UserError) as error:
                resolve(str(tmp_path / "ds.json"), RunConfig())
            found[f"{section}.{key} {wrong}" if section else f"{key} {wrong}"] = str(error.value)
    assert len(OWNED) and len(found) > 200 and share(found) >= 0.9


def test_commands():
    rng, found = random.Random(4), {}
    for name in COMMANDS:
        for _ in range(4):
            wrong = typo(name, rng)
            with pytest.raises(Ended) as error:
                command(wrong)
            found[f"{name} {wrong}"] = error.value.said
    assert share(found) >= 0.9


def test_flags_of_a_run():
    """Through the parser that all commands share, which takes a tenth of a second: one key of five."""
    rng, missed, total = random.Random(5), [], 0
    for key in KEYS[::5]:
        section, _, name = key.rpartition(".")
        flag = f"--{key}".replace("_", "-")
        wrong = (
            f"--{section}.{typo(name, rng)}".replace("_", "-") if section else f"--{typo(name, rng)}".replace("_", "-")
        )
        if wrong[2:].replace("-", "_") in KEYS:
            continue
        with pytest.raises(Ended) as error:
            command("train", wrong, "1")
        total += 1
        if not re.search(rf"{re.escape(flag)}(?![\w.-])", error.value.said.replace("_", "-")):
            missed.append((flag, wrong))
    print(f"{total - len(missed)} of {total} answered; not: {missed}")
    assert len(missed) <= 0.1 * total
