"""Segment Anything: image encoder, box decoder, and the graph that fuses masks into a label map."""
