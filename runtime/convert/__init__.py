"""Convert a label store to the formats of other tools, one file a format."""
