"""One thread: the tensors here are tiny, and threads that share a core spend most of their time waiting for each other."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; processes that tests start inherit it
