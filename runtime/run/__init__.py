"""A run over a folder of images: listing, reading ahead, batching, writing the label store."""
