"""Receptive fields: which input pixels a neuron sees."""
