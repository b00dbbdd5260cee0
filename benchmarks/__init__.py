"""How fast it is, measured: `python -m benchmarks` (the suite), `.convolutions` (measured.json), `.long` (by hand)."""
