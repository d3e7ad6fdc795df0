from pathlib import Path

import pytest

from laser_dist.bench.guard import prepare


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model on the embedded sample, as the benchmark trains it."""
    return prepare(tmp_path_factory.mktemp("guarded"))
