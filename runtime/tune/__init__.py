"""Tries settings on labeled photographs: the models run once, and what they found is decided again for each setting."""
