"""For every unit of a ConvNet, the nine image patches that excite it most."""
