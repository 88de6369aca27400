"""Masks between the decoder and the label map: small regions of them, and runs of whole ones."""
