"""client of meadow."""
