from pathlib import Path

import pytest

from laser_dist.errors import UserError
from laser_dist.launch.hosts import EXITED, Hosts, chosen, read_hostfile

POOL = {"alpha": [0, 1, 2, 3], "beta": [0, 1, 2, 3], "gamma": [0, 1]}


@pytest.fixture
def hostfile(tmp_path: Path) -> Path:
    path = tmp_path / "hosts"
    path.write_text("# two racks\nalpha slots=4\n\nbeta  slots=4\ngamma slots=2\n")
    return path


@pytest.mark.parametrize(
    "filters",
    [
        {},
        {"include": "beta@alpha:0,2"},
        {"include": "alpha:1"},
        {"exclude": "beta"},
        {"exclude": "alpha:3@gamma:0,1"},
        {"nodes": 2},
        {"slots": 2},
        {"nodes": 1, "slots": 3},
    ],
)
def test_hosts_are_those_that_deepspeed_chooses(hostfile: Path, filters: dict) -> None:
    """The supervisor ends and blames by this list: another one than DeepSpeed's would reach the wrong hosts."""
    from deepspeed.launcher.runner import apply_num_nodes_and_gpus, fetch_hostfile, parse_inclusion_exclusion

    pool = fetch_hostfile(str(hostfile))
    theirs = parse_inclusion_exclusion(pool, filters.get("include", ""), filters.get("exclude", ""))
    theirs = apply_num_nodes_and_gpus(theirs, filters.get("nodes", -1), filters.get("slots", -1))
    ours = chosen(read_hostfile(hostfile), **filters)
    assert list(ours.items()) == list(theirs.items())


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("alpha 4\n", ":1: 'alpha 4'"),
        ("alpha slots=0\n", "1 or more"),
        ("alpha slots=4\nalpha slots=4\n", ":2: alpha appears twice"),
        ("# nothing\n", "names no host"),
    ],
)
def test_a_bad_hostfile_names_the_line(tmp_path: Path, content: str, part: str) -> None:
    (tmp_path / "hosts").write_text(content)
    with pytest.raises(UserError, match="hosts") as caught:
        read_hostfile(tmp_path / "hosts")
    assert part in str(caught.value)


def test_a_missing_hostfile_is_refused(tmp_path: Path) -> None:
    """DeepSpeed would train on this machine alone."""
    with pytest.raises(UserError, match="no such file"):
        read_hostfile(tmp_path / "hosts")


@pytest.mark.parametrize(
    ("filters", "part"),
    [
        ({"include": "delta"}, "'delta' is not in the hostfile"),
        ({"include": "alpha:7"}, "slots 0 to 3, not 7"),
        ({"include": "alpha:x"}, "host:0,2"),
        ({"exclude": "alpha@beta@gamma"}, "leaves no host"),
        ({"include": "alpha", "exclude": "beta"}, "one of"),
        ({"include": "alpha", "nodes": 1}, "one of"),
        ({"nodes": 4}, "has 3 hosts"),
    ],
)
def test_a_bad_filter_says_what_is_wrong(filters: dict, part: str) -> None:
    with pytest.raises(UserError) as caught:
        chosen(POOL, **filters)
    assert part in str(caught.value)


def test_ranks_follow_the_hosts_in_order() -> None:
    assert Hosts({"b": [0, 1], "a": [3]}).ranks() == {"b": range(2), "a": range(2, 3)}


def test_pdsh_line_of_a_failed_host_is_read() -> None:
    match = EXITED.match("pdsh@head-1: gpu-7.rack: ssh exited with exit code 255")
    assert match and match.groups() == ("gpu-7.rack", "255")
    assert not EXITED.match("gpu-7: pdsh@head-1: ssh exited with exit code 255")
