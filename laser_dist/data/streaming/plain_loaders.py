"""What one would write without this package: plain pipelines over the same shards, for `laser-dist bench loader`.

They shuffle as their libraries recommend, check nothing, cannot resume, and depend on the number of workers.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from laser_dist.batch import PackedBatch
from laser_dist.data.schema import Example, decode_example, parse_example

BUFFER = 1000  # examples shuffled together
Pack = Callable[[Sequence[Example]], PackedBatch]


def webdataset_batches(shards: Sequence[Path], pack: Pack, *, queries: int, workers: int) -> Iterable[PackedBatch]:
    """One pass with WebDataset's own pipeline; each worker ends with a batch of what is left."""
    import webdataset

    def decode(sample: dict[str, Any]) -> Example:
        return decode_example(sample["json"], sample["__key__"])

    dataset = webdataset.WebDataset([str(path) for path in shards], shardshuffle=len(shards), empty_check=False)
    dataset = dataset.shuffle(BUFFER).map(decode).batched(queries, collation_fn=pack, partial=True)
    return DataLoader(dataset, batch_size=None, num_workers=workers)


def webdataset_rows(shards: Sequence[Path]) -> Iterator[tuple[str, bytes]]:
    """(name of the member, its bytes) of every row, as WebDataset reads them; nothing is decoded."""
    import webdataset

    for sample in webdataset.WebDataset([str(path) for path in shards], shardshuffle=False, empty_check=False):
        yield f"{sample['__key__']}.json", sample.get("json", b"")


def datasets_batches(shards: Sequence[Path], pack: Pack, *, queries: int, workers: int) -> Iterable[PackedBatch]:
    """One pass with `datasets` in streaming mode; each worker ends with a batch of what is left."""
    import datasets

    def parse(row: dict[str, Any]) -> dict[str, Example]:
        return {"example": parse_example(row["json"], row["__key__"])}

    def collate(rows: list[dict[str, Example]]) -> PackedBatch:
        return pack([row["example"] for row in rows])

    datasets.disable_progress_bars()
    files = {"train": [str(path) for path in shards]}
    dataset = datasets.load_dataset("webdataset", data_files=files, split="train", streaming=True)
    dataset = dataset.shuffle(seed=0, buffer_size=BUFFER).map(parse, remove_columns=["json", "__key__", "__url__"])
    return DataLoader(dataset, batch_size=queries, num_workers=workers, collate_fn=collate)
