"""Passes over a whole data set: scan, merge, pack and verify, with their checkpoints and signals."""
