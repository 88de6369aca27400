"""Grounding-DINO: checkpoints in, `text` and `image-HxW` graphs out."""
