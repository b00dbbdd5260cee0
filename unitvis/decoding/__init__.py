"""From the bytes of image files to the pixels of a network's input, in worker processes; nothing here needs PyTorch."""
