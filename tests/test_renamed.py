"""A renamed key works for one version with a warning that names the new one, in recipes and as a flag, then no more."""

import json
from pathlib import Path

import pytest

from laser_dist import renamed
from laser_dist.config import RunConfig
from laser_dist.errors import UserError
from laser_dist.recipe import load_config, read_recipe, to_toml
from laser_dist.renamed import RENAMED, Renamed


@pytest.fixture
def recipe(tmp_path: Path):
    def write(text: str) -> Path:
        (tmp_path / "recipe.toml").write_text(text)
        return tmp_path / "recipe.toml"

    return write


@pytest.fixture
def complete(recipe, tmp_path: Path) -> list[str]:
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/manifest.json").write_text(json.dumps({}))
    return [str(recipe(f'output = "{tmp_path}/run"\n[model]\nname = "m"\n[data]\ntrain = "{tmp_path}/shards"\n'))]


def known(key: str) -> bool:
    section, _, name = key.rpartition(".")
    return hasattr(getattr(RunConfig(), section) if section else RunConfig(), name)


@pytest.mark.parametrize("old", RENAMED)
def test_every_entry_leads_from_a_key_that_is_gone_to_one_that_is_there(old: str) -> None:
    assert known(RENAMED[old].to) and not known(old)


def test_recipe_of_an_earlier_version(recipe, capsys) -> None:
    """logging.profile_steps was replaced by the section [profile]."""
    config = read_recipe(recipe("[logging]\nevery = 5\nprofile_steps = 2\n[profile]\nwait = 1\n"))
    assert (config.profile.active, config.profile.wait, config.logging.every) == (2, 1, 5)
    told = capsys.readouterr().err
    assert "logging.profile_steps is now profile.active" in told and "until laser_dist 0.2" in told
    assert told.count("warning") == 1
    assert read_recipe(recipe(to_toml(config))) == config and capsys.readouterr().err == ""


@pytest.mark.parametrize("flag", [["--logging.profile-steps", "2"], ["--logging.profile_steps=2"]])
def test_flag_of_an_earlier_version(complete, capsys, flag: list[str]) -> None:
    assert load_config([*complete, *flag]).profile.active == 2
    assert "is now profile.active" in capsys.readouterr().err


def test_switches_keep_their_sense(complete, monkeypatch) -> None:
    monkeypatch.setitem(RENAMED, "launch.check_hosts", Renamed("launch.preflight", until="99.0"))
    monkeypatch.setitem(RENAMED, "go_on", Renamed("resume", until="99.0"))
    assert load_config(complete).launch.preflight
    config = load_config([*complete, "--launch.no-check-hosts", "--go-on"])
    assert not config.launch.preflight and config.resume
    assert not load_config([*complete, "--no-go-on"]).resume


def test_other_ranks_say_nothing(recipe, capsys, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert read_recipe(recipe("[logging]\nprofile_steps = 2")).profile.active == 2
    assert capsys.readouterr().err == ""


def test_both_names_are_refused(recipe) -> None:
    with pytest.raises(UserError, match=r"logging.profile_steps and profile.active are the same key.*keep"):
        read_recipe(recipe("[logging]\nprofile_steps = 2\n[profile]\nactive = 3"))


def test_wrong_values_are_told_under_the_new_name(recipe) -> None:
    with pytest.raises(UserError, match=r"profile.active = 'two': expected int"):
        read_recipe(recipe("[logging]\nprofile_steps = 'two'"))
    with pytest.raises(UserError, match="profile is a section"):
        read_recipe(recipe("profile = 3\n[logging]\nprofile_steps = 2"))


@pytest.mark.parametrize(
    "version, works", [("0.1.0", True), ("0.1.9rc1", True), ("0.2.0", False), ("0.10.0", False), ("1.0", False)]
)
def test_the_old_name_ends_with_its_version(recipe, monkeypatch, version: str, works: bool) -> None:
    monkeypatch.setattr(renamed, "__version__", version)
    path = recipe("[logging]\nprofile_steps = 2")
    if works:
        assert read_recipe(path).profile.active == 2
    else:
        with pytest.raises(UserError, match=r"logging.profile_steps was renamed: write profile.active"):
            read_recipe(path)
