"""CLIP: checkpoints in, `image` and `text` graphs out."""
