"""One thread: tensors are tiny here, and threads that share a core spend their time waiting for each other."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; processes that tests start inherit it
