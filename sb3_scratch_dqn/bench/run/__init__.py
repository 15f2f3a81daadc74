"""Training the runs of a comparison."""
