"""Pictures of winners: patches, tiles, sheets, notebook cells."""
