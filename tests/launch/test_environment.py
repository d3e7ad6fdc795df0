import subprocess
import sys
from pathlib import Path

import pytest

from laser_dist.errors import UserError
from laser_dist.launch.environment import write_environment

NASTY = 'a "b" $HOME `id` \\ c'


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


def on_host(folder: Path, names: list[str]) -> list[str]:
    """What the variables are in a shell that runs what DeepSpeed makes of our file."""
    from deepspeed.launcher.multinode_runner import PDSHRunner

    runner = object.__new__(PDSHRunner)
    runner.exports = {}
    for line in (folder / "env").read_text().splitlines():
        runner.add_export(*line.split("=", maxsplit=1))
    script = "".join(f"export {name}={value}; " for name, value in runner.exports.items())
    show = "; ".join(f'printf "%s\\n" "${name}"' for name in names)
    shell = ["/bin/bash", "-c", script + show]
    return subprocess.run(shell, env={"PATH": "/bin", "HOME": "/x"}, capture_output=True, text=True).stdout.splitlines()


def test_values_arrive_as_they_are(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed puts quotes around a value and escapes nothing inside: a `$` or a backtick would run on the host."""
    monkeypatch.setenv("NCCL_NETDEVS_POLICY", NASTY)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "^lo,docker0")
    write_environment(elsewhere / "env", {"LASER_DIST_RUN": "/runs/with a space"}, Path("/opt/ve nv/bin"))
    names = ["NCCL_NETDEVS_POLICY", "NCCL_SOCKET_IFNAME", "LASER_DIST_RUN", "PATH"]
    assert on_host(elsewhere, names) == [NASTY, "^lo,docker0", "/runs/with a space", "/opt/ve nv/bin:/bin"]


def test_secrets_stay_here_and_the_users_file_wins(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, "hush")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    (elsewhere / ".deepspeed_env").write_text("# ours\n\nNCCL_DEBUG=WARN\nSITE=here\n")
    write_environment(elsewhere / "env", {}, Path("/bin"))
    assert "hush" not in (elsewhere / "env").read_text()
    assert on_host(elsewhere, ["NCCL_DEBUG", "SITE"]) == ["WARN", "here"]


def test_a_bad_line_of_the_users_file_is_named(elsewhere: Path) -> None:
    """DeepSpeed answers one without = with a traceback."""
    (elsewhere / ".deepspeed_env").write_text("NCCL_DEBUG=WARN\nexport SITE=here\n")
    with pytest.raises(UserError, match=r"\.deepspeed_env:2"):
        write_environment(elsewhere / "env", {}, Path(sys.executable).parent)


def test_values_for_mpirun_are_not_quoted(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No shell reads them there."""
    monkeypatch.setenv("NCCL_IB_HCA", "=mlx5_0,mlx5_1")
    write_environment(elsewhere / "env", {"LASER_DIST_RUN": "/run"}, Path("/bin"), launcher="openmpi")
    lines = (elsewhere / "env").read_text().splitlines()
    assert "NCCL_IB_HCA==mlx5_0,mlx5_1" in lines and "LASER_DIST_RUN=/run" in lines
    assert not any(line.startswith("PATH=") for line in lines)
