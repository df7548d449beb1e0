"""Where an artifact is right and where it is wrong: curves, confusions, slices, worst mistakes."""
