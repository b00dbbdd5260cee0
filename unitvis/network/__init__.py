"""The network that is read: its layers, its device, and its canonical forward pass."""
