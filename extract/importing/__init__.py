"""Import of features and targets computed by other programs."""
