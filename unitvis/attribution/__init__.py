"""Attribution of responses to pixels: deconvnet projections, response maps, effective boxes, first-layer filters."""
