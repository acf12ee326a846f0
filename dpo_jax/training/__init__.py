"""What a run is made of: set up, training data, optimizer, checkpoints, the reference's cache."""
