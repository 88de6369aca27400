"""Train a segmenter on pseudo-labels, and score label maps."""
