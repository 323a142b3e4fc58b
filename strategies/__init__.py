"""strategies of meadow."""
