"""A study's runs without their checkpoints: all that its report is made of, to keep, and to make it again from."""

import gzip
import io
import tarfile
from pathlib import Path
from typing import Any

from laser_dist.files import replacing, write_json
from laser_dist.reading import decode_json
from laser_dist.study.cells import Workspace
from laser_dist.study.data import Prepared
from laser_dist.study.definition import Study

MADE_OF = "made_of.json"
"""What data and backbones hash to: a report of stored runs needs neither."""
_KEPT = ("cell.json", "result.json", "failed.json", "choice.json", "run/metrics.jsonl")


def note(workspace: Workspace) -> None:
    """Write into the study's folder what its cells are made of."""
    data = {name: prepared.hashes for name, prepared in workspace.data.items()}
    write_json(workspace.out / MADE_OF, {"data": data, "model": workspace.model_name, "models": workspace.models})


def noted(study: Study, out: Path) -> Workspace | None:
    """The workspace as it was when cells last ran, to read only; None where that is not known of all datasets."""
    file = out / MADE_OF
    made: dict[str, Any] = decode_json(file.read_text(encoding="utf-8")) if file.is_file() else {"data": {}}
    if not study.datasets.keys() <= made["data"].keys():
        return None
    data = {name: Prepared(out / "data" / name, {}, hashes, None) for name, hashes in made["data"].items()}
    return Workspace(study, out, data, made["model"], made["models"])


def store(out: Path, file: Path) -> None:
    """Pack what the report is made of; the same runs make the same bytes."""
    cells = [path for name in _KEPT for path in (out / "cells").rglob(name)]
    with replacing(file) as temporary, temporary.open("wb") as raw:
        with gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as stream, tarfile.TarFile("", "w", stream) as archive:
            for path in [out / MADE_OF, *sorted(cells)]:
                content = path.read_bytes()
                entry = tarfile.TarInfo(str(path.relative_to(out)))  # without times and owners
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
