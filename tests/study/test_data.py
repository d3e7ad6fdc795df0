"""Datasets of a study: parts that are started together share what one of them prepares."""

from concurrent.futures import ThreadPoolExecutor

from laser_dist.study.data import prepare_dataset
from laser_dist.study.definition import Dataset


def test_parts_started_together_wait_for_each_other(tmp_path):
    """`study --only A` and `study --only B`, started together, ended with "another process is writing"."""

    def prepare(_):
        return prepare_dataset(Dataset(name="sample", folder="@sample"), tmp_path, tmp_path / "data", curve_passages=10)

    with ThreadPoolExecutor(4) as pool:
        first, *others = pool.map(prepare, range(4))
    assert others == [first] * 3
    assert (first.shards / "manifest.json").is_file()
    assert first.curve[0].is_file()
