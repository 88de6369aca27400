"""Converts a label store to the formats of other tools, one module for each format."""
