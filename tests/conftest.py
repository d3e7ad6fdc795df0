"""Set before torch and triton are imported, for all tests and, as far as it stays set, the processes they start.

One thread: tensors are tiny here, and threads that share a core spend their time waiting for each other.

Without a GPU the Triton kernels run in Triton's interpreter, on CPU tensors. Triton decides that when a function is
defined, so it is imported here, once; then the variable goes, because other tests must not find themselves interpreted.
"""

import importlib.util
import os
from collections import Counter

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

if not torch.cuda.is_available() and importlib.util.find_spec("triton"):
    os.environ["TRITON_INTERPRET"] = "1"
    import laser_kernels.latent_attention_triton
    import laser_kernels.pair_triton  # noqa: F401

    del os.environ["TRITON_INTERPRET"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, so that no worker is left with a long file when the others have ended."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])
