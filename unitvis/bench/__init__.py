"""Benchmark of a scan against baselines in plain PyTorch."""
