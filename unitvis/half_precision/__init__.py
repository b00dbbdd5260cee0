"""The step of a scan in half precision: a rewritten copy of the model, captured into a CUDA graph on a GPU."""
