"""Where an export comes from and where it goes: checked before expensive work, written beside, renamed when whole."""

import dataclasses
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from laser_dist.errors import UserError
from laser_dist.files import rename_over, sha256
from laser_dist.reading import read_object
from laser_dist.retrieval.card import FILE as CARD
from laser_dist.retrieval.card import RetrieverCard
from laser_dist.retrieval.exporting.formats import INSTALLED, SHIPPED

STATE = "trainer.json"


def find_source(checkpoint: Path) -> Path:
    """The model folder of a run, a checkpoint or a model folder. UserError if it is none, or not as it was saved."""
    from laser_dist.retrieval.folders import model_folder

    # A hub id is no checkpoint; a mistyped folder must not be looked up there.
    if not Path(checkpoint).expanduser().is_dir():
        raise UserError(f"{checkpoint}: this folder does not exist; give a run, a checkpoint or a model folder")
    source = Path(model_folder(checkpoint)).resolve()
    _check_unaltered(source)
    _check_card(source)
    return source


def check_target(out: Path, overwrite: bool) -> None:
    """UserError unless `out` is new, empty, or an export that may be replaced."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"--out {out}: is a file; give the name of a folder")
    if not any(out.iterdir()):
        return
    if not overwrite:
        raise UserError(
            f"--out {out}: is not empty; choose another folder, or replace the export in it with --overwrite"
        )
    if not _is_export(out):
        raise UserError(
            f"--out {out}: holds something else than an export, and --overwrite does not delete that; "
            "choose another folder"
        )


def check_space(out: Path, needed: int) -> None:
    """UserError unless `needed` bytes are free where `out` will be."""
    existing = next(folder for folder in (out, *out.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(
            f"--out {out}: the weights take {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free there; "
            "make room, choose another disk, or a smaller --dtype"
        )


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write to; it gets the name when the block succeeds, and vanishes when not."""
    from safetensors import SafetensorError

    staging = out.with_name(f".{out.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        yield staging
        _share(staging)
        rename_over(staging, out)
    except (OSError, SafetensorError) as error:  # safetensors has an error of its own for a full disk
        raise UserError(f"cannot write {out}: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _check_unaltered(source: Path) -> None:
    """A checkpoint's manifest knows each file's hash: a swapped tokenizer and a flipped bit load without complaint."""
    path = source.parent / "manifest.json"
    if source.name != "model" or not path.is_file():
        return
    try:
        files = read_object(path)["files"]
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error!r}); export another checkpoint") from error
    for name, identity in expected.items():
        file = source.parent / name
        if name.startswith("model/") and identity != _identity(file):
            raise UserError(f"{file}: is not what training saved (its size or hash differs); export another checkpoint")


def _check_card(source: Path) -> None:
    """UserError where a checkpoint's card says otherwise than the settings that training recorded beside it."""
    path = source.parent / STATE
    if source.name != "model" or not path.is_file():
        return
    try:
        settings = read_object(path).get("settings") or {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); export another checkpoint") from error
    card = dataclasses.asdict(RetrieverCard.load(source))
    said = {f"{part}.{name}": value for part in ("thinking", "text") for name, value in card[part].items()}
    if card["temperature"] is not None:
        said["objective.temperature"] = card["temperature"]
    if told := [
        f"{key} = {value!r}, and training used {settings[key]!r}"
        for key, value in said.items()
        if key in settings and settings[key] != value
    ]:
        raise UserError(f"{source / CARD} says {'; '.join(told)}: copy the checkpoint again from where it was trained")


def _identity(file: Path) -> tuple[int, str] | None:
    if not file.is_file():
        return None
    return file.stat().st_size, sha256(file)


def _is_export(folder: Path) -> bool:
    """Whether nothing is lost by replacing the folder. A checkpoint has no modules.json; a clone of a hub has .git."""
    modules = folder / "modules.json"
    if not (folder / CARD).is_file() or not modules.is_file() or not all(path.is_file() for path in folder.iterdir()):
        return False
    named = modules.read_text(encoding="utf-8", errors="replace")
    return INSTALLED in named or f'"{SHIPPED}.' in named


def _share(folder: Path) -> None:
    """safetensors writes files that only their owner can read; give all the mode that new files have here."""
    mode = (folder / CARD).stat().st_mode
    for path in folder.iterdir():
        path.chmod(mode)
