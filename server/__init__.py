"""server of meadow."""
