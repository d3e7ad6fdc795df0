"""Who is to blame, from what one rank has seen; no processes."""

from dataclasses import replace

import pytest

from laser_dist.watch.judge import Finding, Sighting, judge, laggard
from laser_dist.watch.pulse import Beat

STEP = Beat(0, 3, "here", 1, 1, 1, step=17, phase="forward", changes=90, patience=6.0, brief=6.0)
SAVING = replace(STEP, phase="save", patience=None)


def seen(*sightings: Sighting) -> dict[int, Sighting]:
    for rank, sighting in enumerate(sightings):
        sighting.beat.rank = rank
    return {sighting.beat.rank: sighting for sighting in sightings}


def at(beat: Beat = STEP, phase_age: float = 0.0, tick_age: float = 0.0, state: str | None = "S", **other) -> Sighting:
    return Sighting(replace(beat, **other), phase_age, tick_age, state)


def blamed(finding: Finding | None) -> tuple[int, str] | None:
    return (finding.rank, finding.kind) if finding else None


WAITS = {"waiting": True, "phase_age": 50.0}


@pytest.mark.parametrize(
    ("sightings", "expected"),
    [
        ([at(), at(), at()], None),
        # Three median steps and some seconds are not over.
        ([at(phase_age=5.9), at(phase_age=5.9), at(phase_age=1)], None),
        ([at(**WAITS), at(phase_age=6.1), at(**WAITS)], (1, "hung")),
        # Those who wait for a rank that saves have its time, not their own.
        ([at(**WAITS), at(SAVING, phase_age=500), at(**WAITS)], None),
        ([at(**WAITS), at(SAVING, phase_age=500, tick_age=500), at(**WAITS)], None),
        # Stopped, in whatever phase; a debugger's stop is none.
        ([at(), at(SAVING, tick_age=6.1, state="T"), at()], (1, "stopped")),
        ([at(), at(SAVING, tick_age=5.9, state="T"), at()], None),
        ([at(), at(SAVING, tick_age=6.1, state="t"), at()], None),
        # Without ticks a rank is not believed to wait.
        ([at(**WAITS), at(**WAITS), at(phase_age=7, tick_age=7, waiting=True)], (2, "locked")),
        # Several are late: who does not tick, then who is furthest behind.
        ([at(phase_age=60), at(phase_age=50, changes=89), at(phase_age=40, tick_age=40)], (2, "locked")),
        ([at(phase_age=60), at(phase_age=50, changes=89), at(phase_age=40)], (1, "hung")),
        # All wait for each other.
        ([at(**WAITS), at(**WAITS, changes=89), at(**WAITS)], (1, "hung")),
        ([at(**WAITS), at(SAVING, waiting=True, phase_age=500), at(**WAITS)], None),
        ([at(**WAITS), at(waiting=True, phase_age=1), at(**WAITS)], None),
        # Gone without a word; gone after its last one.
        ([at(), at(state=""), at()], (1, "died")),
        ([at(), at(state="", code=0), at()], None),
        ([at(), at(state="", code=75), at()], None),
        # A rank's own failure comes before what it did to others, and these before their complaints.
        ([at(state=""), at(code=1, blames=1, kind="failed"), at()], (1, "failed")),
        ([at(code=1, blames=2, kind="died"), at(), at(state="")], (2, "died")),
        ([at(code=1, blames=2, kind="stopped"), at(), at(state="T")], (2, "stopped")),
        # Ranks of other hosts are seen late, and through files only.
        ([at(), at(phase_age=30, tick_age=30, state=None), at()], None),
        ([at(**WAITS), at(phase_age=40, tick_age=40, state=None), at(**WAITS)], (1, "hung")),
    ],
)
def test_the_one_to_blame(sightings: list[Sighting], expected: tuple[int, str] | None) -> None:
    assert blamed(judge(own=0 if sightings[0].beat.code is None else 1, seen=seen(*sightings))) == expected


def test_a_job_that_was_stopped_as_a_whole_ages_nobody() -> None:
    """The observer was stopped as well: what its clock says of that time does not count."""
    sighting = at()
    sighting.update(replace(STEP), "S", awake=0.4)
    assert sighting.phase_age == sighting.tick_age == 0.4
    sighting.update(replace(STEP, ticks=1), "S", awake=0.2)
    assert (sighting.phase_age, sighting.tick_age) == (pytest.approx(0.6), 0)
    sighting.update(replace(STEP, ticks=1, changes=91), "S", awake=0.2)
    assert (sighting.phase_age, sighting.tick_age) == (0, 0.2)


def test_whom_a_timed_out_collective_waited_for() -> None:
    assert blamed(laggard(0, seen(at(**WAITS), at(SAVING, phase_age=700), at(**WAITS)))) == (1, "hung")
    assert laggard(0, seen(at(**WAITS), at(**WAITS), at(**WAITS))) is None
