"""Photographs to pseudo-labels, in batches, without torch."""
