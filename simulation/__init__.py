"""simulation of meadow."""
