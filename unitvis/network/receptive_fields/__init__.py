"""Receptive fields: the input pixels that can change a neuron, by tracing the model or by probing it."""
