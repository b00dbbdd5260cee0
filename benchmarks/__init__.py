"""How fast it is, measured: `python -m benchmarks` (the suite), `.convolutions` (measured.json), and by hand `.long`, `.crp`,
`.exactness`, `.million`, `.processes` and `.start`, whose results are in results/long.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests" / "unitvis"))  # networks and emulations that the tests use
