"""How many candidates a scan in half precision keeps of every unit, for float32 to decide between."""

EXTRA_CANDIDATES = 55  # places of a unit beyond its k winners: 64 candidates in all for k = 9
