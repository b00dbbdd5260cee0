"""Processes that call functions: results, exceptions, and the death of one."""

from __future__ import annotations

import math
import operator
import os

import pytest

from unitvis.decoding.crew import Crew
from unitvis.decoding.processes import may_start
from unitvis.decoding.worker import Reading

pytestmark = pytest.mark.skipif(not may_start(), reason="there are no worker processes on this system")


def test_functions_are_called_elsewhere():
    with Crew(2) as crew:
        futures = [crew.submit(math.factorial, number) for number in range(6)]
        assert [future.result() for future in futures] == [1, 1, 2, 6, 24, 120]
        assert crew.submit(os.getpid).result() != os.getpid()
        with pytest.raises(ZeroDivisionError):
            crew.submit(operator.truediv, 1, 0).result()
        assert crew.submit(operator.truediv, 1, 2).result() == 0.5
        assert crew.submit(Reading, 1, 2, 3, 4, {}).result() == Reading(1, 2, 3, 4, {})
        with pytest.raises(OSError, match="a process that draws has died"):
            crew.submit(os._exit, 1).result()
