"""The environment of ranks on other hosts: ssh starts them with none of this one's.

DeepSpeed's launcher exports what it finds in a `.deepspeed_env` file. We write it one: the user's own lines first,
then what this shell says about communication and libraries, then what we set. Keys and tokens stay here: whatever is
exported shows in the process list of every host.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from laser_dist.errors import UserError
from laser_dist.launch.outcome import ATTEMPT
from laser_dist.launch.processes import MARK
from laser_dist.redaction import find_secret

FORWARDED = (
    *("NCCL_", "TORCH_NCCL_", "GLOO_", "TORCH_DISTRIBUTED_", "TORCH_CPP_LOG_LEVEL", "CUDA_DEVICE_MAX_CONNECTIONS"),
    *("OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM", "PYTORCH_", "TRITON_CACHE_DIR", "LASER_KERNELS", "DS_ACCELERATOR"),
    *("HF_HOME", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_ENDPOINT", "TRANSFORMERS_OFFLINE", "WDS_SECURE"),
)
"""Names, or the beginnings of names, that ranks on other hosts get from this shell, unless they hold a secret."""


def for_attempt(run: Path, attempt: int) -> dict[str, str]:
    """What marks the processes of an attempt."""
    return {MARK: str(run), ATTEMPT: str(attempt)}


def write_environment(path: Path, extra: dict[str, str], own_bin: Path, *, launcher: str = "pdsh") -> None:
    """A `.deepspeed_env` for the hosts: the user's own, this shell's, `own_bin` first on the path, and `extra`."""
    lines = dict(own_lines())
    # srun hands everything over by itself, and would cut values at their commas.
    forwarded = (
        {}
        if launcher == "slurm"
        else {n: v for n, v in os.environ.items() if n.startswith(FORWARDED) and not find_secret(v)}
    )
    if launcher == "pdsh":  # the only one whose values pass through a shell
        lines = {**{name: _escaped(value) for name, value in forwarded.items()}, **lines}
        lines.setdefault("PATH", f"{_escaped(str(own_bin))}:$PATH")
        lines |= {name: _escaped(value) for name, value in extra.items()}
    else:
        lines = {**forwarded, **lines, **extra}
    path.write_text("".join(f"{name}={value}\n" for name, value in lines.items()), encoding="utf-8")


def own_lines() -> Iterator[tuple[str, str]]:
    """Lines of the user's files, which DeepSpeed looks for in the home folder and here. UserError for a bad one."""
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    for file in (Path.home() / name, Path(name)):
        for number, line in enumerate(file.read_text().splitlines() if file.is_file() else [], 1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            key, found, value = line.partition("=")
            if not found or not re.fullmatch(r"[A-Za-z_]\w*", key.strip()):
                raise UserError(f"{file}:{number}: {line!r} is not NAME=value (without `export`)")
            yield key.strip(), value.strip()


def _escaped(value: str) -> str:
    """For the double quotes that DeepSpeed puts around a value with special characters, and only then."""
    return re.sub(r'([\\"$`])', r"\\\1", value) if re.search(r"[^\w@%+=:,./-]", value.strip()) else value
