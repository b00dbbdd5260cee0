"""The images that matter are read again, and decided by canonical responses."""
