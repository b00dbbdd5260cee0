"""The demo, which needs no network connection: generated pictures and a small trained network to scan them."""
