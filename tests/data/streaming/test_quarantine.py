import json

import pytest

from laser_dist.data.streaming.quarantine import Defect, Quarantine
from laser_dist.errors import UserError

SHARD = Defect("data/shard-000003.tar", None, "its sha256 differs", 5)
ROW = Defect("data/shard-000001.tar", "000000007.json", "not valid JSON", 1)


def test_distinct_defects_are_counted_and_reported_once(tmp_path):
    report = tmp_path / "quarantine.jsonl"
    quarantine = Quarantine(100, 0.5, report)
    quarantine.add([SHARD, ROW], rank=2)
    quarantine.add([ROW], rank=0)
    assert (quarantine.shards, quarantine.rows, quarantine.lost) == (1, 1, 6)
    first, second = map(json.loads, report.read_text().splitlines())
    assert first.pop("time").endswith("+00:00") and second.pop("time")
    assert first == {"shard": SHARD.shard, "member": None, "reason": SHARD.reason, "examples": 5, "rank": 2}
    assert second == {"shard": ROW.shard, "member": ROW.member, "reason": ROW.reason, "examples": 1, "rank": 2}


def test_each_defect_is_handed_on_once():
    quarantine = Quarantine(100, 0.5)
    quarantine.add([SHARD])
    assert quarantine.take_new() == (SHARD,) and quarantine.take_new() == ()
    quarantine.add([SHARD, ROW])
    assert quarantine.take_new() == (ROW,)


def test_the_limit_is_a_share_of_all_examples(tmp_path):
    Quarantine(100, 0.05).add([SHARD])
    with pytest.raises(
        UserError, match=r"6 of 100 .*\(1 shards, 1 rows\).*max_skipped = 0.05.*shard-000001.tar member"
    ):
        Quarantine(100, 0.05, tmp_path / "report").add([SHARD, ROW])
    assert len((tmp_path / "report").read_text().splitlines()) == 2  # reported before it stops
    with pytest.raises(UserError, match="max_skipped = 0 allows"):
        Quarantine(100, 0.0).add([ROW])


def test_a_resumed_run_counts_on(tmp_path):
    report = tmp_path / "quarantine.jsonl"
    Quarantine(100, 0.5, report).add([SHARD])
    resumed = Quarantine(100, 0.05, report)
    resumed.recall([*report.read_text().splitlines(), '{"shard": "cut o', "[]", '"x"'])
    assert (resumed.shards, resumed.lost) == (1, 5)
    resumed.add([SHARD])
    assert len(report.read_text().splitlines()) == 1
    with pytest.raises(UserError, match="6 of 100"):
        resumed.add([ROW])
