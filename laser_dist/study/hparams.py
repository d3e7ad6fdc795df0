"""HParams for TensorBoard: every cell's choices beside what it reached."""

import shutil
from pathlib import Path

from laser_dist.study.collect import Results
from laser_dist.study.definition import flat


def write_hparams(results: Results, folder: Path) -> None:
    """One event file per measured cell, anew: the values in which cells differ, and dev and test metrics."""
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(folder, ignore_errors=True)
    rows = [row for row in results.rows if row.cell.trains and row.measured]
    tables = [flat({k: v for k, v in row.cell.identity.items() if k != "data"}) for row in rows]
    names = sorted({name for table in tables for name in table})
    differing = [name for name in names if len({str(table.get(name)) for table in tables}) > 1]
    for row, table in zip(rows, tables, strict=True):
        said = {name: value for name in differing if (value := table.get(name)) is not None}
        said = {
            name: value if isinstance(value, bool | int | float | str) else str(value) for name, value in said.items()
        }
        said |= {"dataset": row.cell.dataset, "method": row.cell.method}
        reached = {f"{task}/{metric}": v for task, run in row.measured.items() for metric, v in run["metrics"].items()}
        with SummaryWriter(str(folder / row.name.replace("/", "."))) as writer:
            writer.add_hparams(said, reached, run_name=".")
