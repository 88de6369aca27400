"""Runs over many images: listing, reading ahead, batching, and writing the label store."""
