"""Writes an HTML page to review a label store."""
