"""Which pixels a response comes from: effective boxes, deconvnet projections, response maps, first-layer filters."""
