"""A scan in half precision: a rewritten copy of the model ranks each batch, on a GPU as a CUDA graph."""
