"""Drawing winners: patches, tiles, sheets and notebook cells."""
