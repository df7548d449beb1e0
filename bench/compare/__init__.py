"""Several reports as one comparison: what differs, what cannot be claimed."""
