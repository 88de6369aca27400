"""Stage two: what is learned from pseudo-labels, and how label maps are scored."""
