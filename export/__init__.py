"""From official checkpoints to ONNX graphs that provably compute the same."""
