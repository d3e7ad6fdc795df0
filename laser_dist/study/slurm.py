"""A study as Slurm job arrays: one task per method and dataset, each doing what `--only` does."""

import shlex
from pathlib import Path

from laser_dist.study.definition import Study

TEMPLATE = """\
#!/bin/bash
# Submit with: {submit}
#SBATCH --job-name={name}
#SBATCH --array=0-{last}
#SBATCH --output={logs}/%x-%A_%a.txt
#SBATCH --signal=B:TERM@120
# A task that runs out of time saves its run; submit again, and it goes on. Add partition, GPUs and time here.
parts=({parts})
exec {command} --only "${{parts[$SLURM_ARRAY_TASK_ID]}}"
"""


def write_arrays(study: Study, groups: list[tuple[str, str]], command: list[str], out: Path) -> list[Path]:
    """Scripts in the order in which they must run; later ones need what earlier ones train or choose."""
    out.mkdir(parents=True, exist_ok=True)
    waves = [[group for group in groups if _depth(study, group[1]) == depth] for depth in range(len(study.methods))]
    scripts: list[Path] = []
    for wave in filter(None, waves):
        script = out / f"study-{len(scripts) + 1}.slurm"
        after = f"--dependency=afterok:JOB-OF-{scripts[-1].name} " if scripts else ""
        parts = " ".join(shlex.quote(f"{dataset}/{name}") for dataset, name in wave)
        text = TEMPLATE.format(
            submit=f"sbatch {after}{script}",
            name=f"{study.name}-{len(scripts) + 1}",
            last=len(wave) - 1,
            logs=out,
            parts=parts,
            command=shlex.join(command),
        )
        script.write_text(text, encoding="utf-8")
        scripts.append(script)
    return scripts


def _depth(study: Study, name: str) -> int:
    """How many methods have to be done before, one after another; baselines need none."""
    method = study.methods.get(name)
    return max((1 + _depth(study, need) for need in method.needs), default=0) if method else 0
