"""Sources that the `datasets` library reads: a folder written by save_to_disk, and data sets on the hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from laser_dist.data.sources.chunks import ROWS, Chunk, grouped, to_arrow
from laser_dist.data.sources.read import FORMS, card_licence, hash_files
from laser_dist.errors import UserError
from laser_dist.reading import is_file_name, read_object


@dataclass(frozen=True)
class Saved:
    """A folder written by `datasets`' save_to_disk; of several splits, train."""

    name: str
    path: Path

    @cached_property
    def _dataset(self) -> Any:
        import datasets

        self._check_files()
        try:
            dataset = datasets.load_from_disk(str(self.path))
        except Exception as error:  # a damaged folder raises many kinds
            raise UserError(f"source {self.name} cannot be loaded with datasets.load_from_disk: {error}") from error
        if isinstance(dataset, datasets.DatasetDict):
            if "train" not in dataset:
                splits = ", ".join(dataset)
                raise UserError(
                    f"source {self.name} has the splits {splits} but no train: give {self.path}/SPLIT instead"
                )
            dataset = dataset["train"]
        return dataset

    def _check_files(self) -> None:
        """UserError where a state.json names a file outside the folder, which load_from_disk would read."""
        for path in sorted(self.path.rglob("state.json")):
            try:
                named = [file["filename"] for file in read_object(path)["_data_files"]]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path} cannot be read ({error}): save the data set again") from None
            if outside := [name for name in named if not is_file_name(name)]:
                raise UserError(f"{path} names {outside[0]!r}, which does not lie in its folder: save the set again")

    def chunks(self, skip: int = 0) -> Iterator[Chunk]:
        dataset = self._dataset.with_format("arrow")
        for first in range(skip, len(dataset), ROWS):
            table = dataset[first : first + ROWS]
            yield Chunk(self.name, first + 1, to_arrow(table), (first + len(table)) / len(dataset))

    @property
    def files(self) -> list[Path]:
        return sorted(path for path in self.path.rglob("*") if path.is_file())

    def identity(self) -> dict[str, str]:
        return {"sha256": hash_files(self.files)}

    def licence(self) -> str:
        return self._dataset.info.license or card_licence(self.path / "README.md")


@dataclass(frozen=True)
class Hub:
    """The train split of a dataset on the hub, streamed: `org/name`, or `org/name:subset`.

    Data sets that come as a Python script are refused (by `datasets`); no code of theirs runs.
    """

    name: str
    files: tuple[Path, ...] = field(default=(), init=False)

    @cached_property
    def _info(self) -> Any:
        from huggingface_hub import HfApi

        with self._explained():
            return HfApi().dataset_info(self.name.partition(":")[0])

    def chunks(self, skip: int = 0) -> Iterator[Chunk]:
        import datasets

        name, _, subset = self.name.partition(":")
        with self._explained():
            dataset = datasets.load_dataset(
                name, subset or None, split="train", streaming=True, revision=self._info.sha
            )
            for first, rows in grouped(dataset.skip(skip) if skip else dataset, skip + 1):
                yield Chunk(self.name, first, rows, 0.0)

    def identity(self) -> dict[str, str]:
        return {"revision": str(self._info.sha)}

    def licence(self) -> str:
        return str((self._info.card_data or {}).get("license") or "")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # of the connection, the hub, `datasets` or the files: many kinds
            reason = str(error).partition("\n")[0]
            raise UserError(
                f'source "{self.name}" is no file here, and the hub dataset of that name cannot be read: '
                f"{type(error).__name__}: {reason}; check the spelling and the connection, or give {FORMS}"
            ) from error
