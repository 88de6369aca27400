"""A trained run applied to photographs: label maps from averaged probabilities, label stores of them, and self-training."""
