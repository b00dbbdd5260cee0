"""What `unitvis demo` scans, offline: generated pictures and a small trained network."""
