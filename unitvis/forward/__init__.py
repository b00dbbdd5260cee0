"""The forward pass: where responses are read, and the ways of computing them."""
