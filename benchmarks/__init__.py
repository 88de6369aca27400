"""Measurements, each beside the bound or the published number it is held against."""
