"""Two processes run the tests beside one another: each has its share of the cores, and so has what it starts."""

from __future__ import annotations

import os

if count := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // count))  # read when torch is imported
