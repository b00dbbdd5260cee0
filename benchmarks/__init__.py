"""How fast it is, measured.

`python -m benchmarks` is the suite, `.convolutions` fills measured.json. By hand: `.long` and `.crp`, which write into
the suite's file, and `.exactness`, `.million`, `.processes` and `.start`, which write into results/long.
"""

import sys
from pathlib import Path

# The package `support` lies beside the tests: networks, photographs, emulations and measures that both need.
sys.path.append(str(Path(__file__).parents[1] / "tests"))
