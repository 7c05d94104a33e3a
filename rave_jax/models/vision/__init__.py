"""Vision towers, a file per architecture."""
