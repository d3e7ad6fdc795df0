import json

import pytest

from laser_dist.bench import resume
from laser_dist.cli import main
from laser_dist.data.streaming.order import Order
from laser_dist.errors import UserError


def test_measures_every_place_and_checks_its_ids(tmp_path, capsys):
    out = tmp_path / "new" / "resume.json"
    flags = ("--examples", "300", "--shard-examples", "10", "--repeats", "1", "--places", "0", "99", "--workers", "0")
    assert main(["bench", "resume", *flags, "--out", str(out)]) == 0
    result, told = json.loads(out.read_text()), capsys.readouterr().out
    assert (result["examples"], result["shards"]) == (300, 30)
    assert {place: row["position"] for place, row in result["places"].items()} == {"0": 0, "99": 297}
    assert all(0 < row["seconds"][0] < 60 for row in result["places"].values()) and "297" in told


def test_other_ids_than_the_orders_are_no_result(tmp_path, monkeypatch):
    settings = resume.Settings(data=tmp_path / "shards", examples=50, shard_examples=10)
    resume.build(settings)
    assert resume.measure(str(settings.data), 50, 0, 4)["position"] == 25
    monkeypatch.setattr(Order, "epoch", lambda self, epoch: list(range(self.examples))[::-1])
    with pytest.raises(UserError, match="position 25 holds 'q.*not what the order says"):
        resume.measure(str(settings.data), 50, 0, 4)


@pytest.mark.parametrize("flags", [("--places", "100"), ("--repeats", "0"), ("--workers", "-1")])
def test_values_that_cannot_be_measured_with_are_refused(flags, capsys):
    assert main(["bench", "resume", *flags]) == 2
    assert flags[0] in capsys.readouterr().err
