"""The deformable-attention kernel against its rivals, one operator at a time."""
