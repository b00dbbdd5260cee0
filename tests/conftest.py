"""Each of several pytest processes uses its share of the cores, and so does every process that it starts."""

from __future__ import annotations

import os

import pytest

if count := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // count))  # read when torch is imported

pytest.register_assert_rewrite("support")  # a failed assertion in a judge shows its values, as one in a test does
