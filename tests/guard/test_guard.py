"""Real trainings with something wrong in them: caught in its step on all ranks, nothing updated, the batch on disk."""

import json
from pathlib import Path

import pytest

from laser_dist.bench.anomalies import ANOMALIES, caught
from laser_dist.bench.guard import train_of_rank
from laser_dist.testing import run_distributed

# Of the benchmark's table: one each of vectors, gradients (before the update, in ZeRO's own step), a collective, and
# what only one rank holds. `laser-dist bench guard` has all of them.
TRIED = [
    "a passage's vector is zero",
    "NaN in a gradient only",
    "a gradient 1e8 times as large",
    "a stale gather on one rank",
    "one bit of a replica flips",
]


@pytest.fixture(scope="module")
def outcomes(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    output = tmp_path_factory.mktemp("anomalies")
    numbers = [number for number, anomaly in enumerate(ANOMALIES) if anomaly.name in TRIED]
    first, second = run_distributed(caught, 2, recipe, output, numbers)
    assert [row["message"] for row in first] == [row["message"] for row in second]  # so that no rank waits for another
    return output, first


def test_anomalies_are_caught_and_nothing_is_updated(outcomes) -> None:
    assert len(outcomes[1]) == len(TRIED)
    for row in outcomes[1]:
        assert row["caught"] and row["unchanged"], row


def test_the_message_says_what_where_and_what_to_do(outcomes) -> None:
    messages = {row["name"]: row["message"] for row in outcomes[1]}
    zero = messages["a passage's vector is zero"]
    for part in ("step 3: a vector of length 0", "on rank", "Named first: ", "of query '", "No parameter was updated"):
        assert part in zero
    assert "guard.row_norm is the limit" in zero and "laser-dist replay" in zero
    assert "Rank 1 got another 0" in messages["a stale gather on one rank"]
    assert "differs in its bits" in messages["one bit of a replica flips"]


def test_a_dump_is_whole_and_says_what_all_ranks_knew(outcomes) -> None:
    number = next(n for n, anomaly in enumerate(ANOMALIES) if anomaly.name == "a passage's vector is zero")
    (dump,) = (outcomes[0] / str(number) / "alarms").iterdir()
    assert dump.name == "step-000003"
    assert {path.name for path in dump.iterdir()} == {
        "alarm.json", "config.toml", "rank_00000.safetensors", "rank_00001.safetensors",
    }  # fmt: skip
    report = json.loads((dump / "alarm.json").read_text())
    assert report["rule"] == "row_norm" and report["world_size"] == 2 and len(report["tables"][0]) == 2
    assert len(report["query_ids"][1][0]) == 8 and report["examples"][0].startswith("the positive of query")


@pytest.mark.parametrize("alarm", ["stop", "warn", "off"])
def test_an_alarm_stops_warns_or_is_not_looked_for(recipe: Path, tmp_path: Path, alarm: str) -> None:
    """A spread that no model has is an alarm at each step; a warning dumps the batch, too, and is said once."""
    flags = ["--output", str(tmp_path / "run"), "--train.max-steps", "3", "--guard.spread", "0.99"]
    (said,) = run_distributed(train_of_rank, 1, recipe, [*flags, "--guard.alarm", alarm])
    steps = len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert steps == (0 if alarm == "stop" else 3)
    assert ("vectors of all passages are alike" in said) == (alarm != "off")
    dumps = list((tmp_path / "run").glob("alarms/*"))
    assert [dump.name for dump in dumps] == ([] if alarm == "off" else ["step-000001"])
