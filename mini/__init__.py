"""Mini models: small configurations of CLIP, Grounding-DINO and SAM, and the drawn scenes they are trained on."""
