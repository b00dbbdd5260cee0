"""From batches to the strongest responses of every unit."""
