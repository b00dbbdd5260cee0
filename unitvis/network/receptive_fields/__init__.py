"""Receptive fields: the input pixels that can change a neuron, found by tracing the model."""
