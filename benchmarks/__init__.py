"""Measurements of speed and quality, beside the machine's maximum or published numbers."""
