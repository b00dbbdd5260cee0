"""A scan of some of the images: which ones they are, and what it came to."""
