"""Benchmarks.

`python -m benchmarks` runs the suite; `benchmarks.convolutions` fills measured.json, and
`benchmarks.steps` times the steps alone. Started by hand: `.long` and
`.crp`, which write into the suite's results file, and `.exactness`, `.million`, `.processes` and `.start`, which write
into results/long.
"""

import sys
from pathlib import Path

# The package `support` lies beside the tests: networks, photographs, emulations and measures that both need.
sys.path.append(str(Path(__file__).parents[1] / "tests"))
