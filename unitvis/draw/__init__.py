"""From winners to pictures: patches, tiles and sheets, projections, response maps, filters."""
