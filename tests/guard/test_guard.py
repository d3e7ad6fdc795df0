"""Real trainings with something wrong in them: caught in its step on all ranks, nothing updated, the batch on disk."""

import json
from pathlib import Path

import pytest

from laser_dist.bench.anomalies import ANOMALIES


@pytest.fixture(scope="module")
def outcomes(on_two_ranks) -> tuple[Path, list[dict]]:
    return on_two_ranks["output"], on_two_ranks["anomalies"]


def test_anomalies_are_caught_and_nothing_is_updated(outcomes) -> None:
    assert len(outcomes[1]) == 5
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


def test_a_judge_hears_the_norm_once_and_can_refuse_the_update(on_two_ranks) -> None:
    """Whatever the stage: DeepSpeed's own optimizers would have clipped and gone on."""
    assert len(on_two_ranks["judged"]) == 5
    for case, norm, good, whole in on_two_ranks["judged"]:
        assert norm > 0 and good and whole, case


@pytest.mark.parametrize("alarm", ["stop", "warn", "off"])
def test_an_alarm_stops_warns_or_is_not_looked_for(on_two_ranks, alarm: str) -> None:
    """A spread that no model has is an alarm at each step; a warning dumps the batch, too, and is said once."""
    run, said = on_two_ranks["output"] / alarm, on_two_ranks["said"][alarm]
    steps = len((run / "metrics.jsonl").read_text().splitlines()) if (run / "metrics.jsonl").exists() else 0
    assert steps == (0 if alarm == "stop" else 3)
    assert ("vectors of all passages are alike" in said) == (alarm != "off")
    assert [dump.name for dump in run.glob("alarms/*")] == ([] if alarm == "off" else ["step-000001"])
