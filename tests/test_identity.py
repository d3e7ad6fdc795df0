"""What a checkpoint must agree with is named, key by key, with both values and the way back."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from laser_dist.config import ObjectiveConfig, RunConfig, ThinkingConfig
from laser_dist.errors import UserError
from laser_dist.identity import differences, fingerprint, require_same, settings

SETS = [("1", ["a", "b"])]
CONFIG = RunConfig()


def of(config: RunConfig, sets: list[Any] = SETS, tokenizer: str = "t") -> dict[str, Any]:
    return settings(config, SimpleNamespace(fingerprint=lambda: sets), tokenizer)  # type: ignore[arg-type]


def test_each_key_that_differs_is_named_with_both_values() -> None:
    """It once was 'another configuration', to be compared by hand."""
    other = replace(CONFIG, thinking=ThinkingConfig(steps=4), objective=ObjectiveConfig(temperature=0.05))
    with pytest.raises(UserError) as error:
        require_same("step-000002", ("x", of(CONFIG)), ("y", of(other, [("1", ["a"])], "u")))
    for part in (
        "step-000002 belongs to another configuration",
        "thinking.steps: 3 in the checkpoint, 4 in this run",
        "objective.temperature: 0.02 in the checkpoint, 0.05 in this run",
        'tokenizer: "t" in the checkpoint, "u" in this run',
        "data.sets: ",
        "--thinking.steps 3",
    ):
        assert part in str(error.value)


def test_what_decides_no_number_may_differ() -> None:
    moved = replace(CONFIG, output="elsewhere", data=replace(CONFIG.data, train="elsewhere", workers=0))
    assert differences(of(CONFIG), of(moved)) == {}
    require_same("x", ("hash", of(CONFIG)), ("another hash, of another version", of(moved)))


def test_a_key_that_a_checkpoint_does_not_have_had_its_default() -> None:
    """Otherwise each new option would make all checkpoints before it useless."""
    saved = of(CONFIG)
    del saved["objective.ramp_steps"]
    assert differences(saved, of(CONFIG)) == {}
    changed = replace(CONFIG, objective=ObjectiveConfig(ramp_steps=5))
    assert list(differences(saved, of(changed))) == ["objective.ramp_steps"]
    assert "does not know" in differences(saved | {"objective.gone": 1}, of(CONFIG))["objective.gone"]


def test_checkpoints_that_have_a_hash_only_still_load() -> None:
    hashed = fingerprint(CONFIG, SETS)
    assert hashed == "d6b718ec3771f1665e3592c377adf0c2b9482a195cb2ed5fc00f53ef2bfa8d3a", (
        "a key came to the recipe: name it in identity.NEWER, or checkpoints without settings are refused"
    )
    require_same("x", (hashed, None), (hashed, of(CONFIG)))
    with pytest.raises(UserError, match="another configuration"):
        require_same("x", ("other", None), (hashed, of(CONFIG)))


def test_what_decides_numbers_is_in_the_fingerprint() -> None:
    plain, offline = RunConfig(), ObjectiveConfig(explicit_weight=0.0, teacher="elsewhere")
    for objective in (ObjectiveConfig(steps_weight=1.0), ObjectiveConfig(refinement_weight=1.0), offline):
        without = replace(objective, steps_weight=0.0, refinement_weight=0.0, teacher=None)
        of_it, of_plain = (fingerprint(replace(plain, objective=x), []) for x in (objective, without))
        assert of_it != of_plain
