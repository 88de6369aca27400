"""Read files that may come from strangers: text, JSON, TOML, checkpoints, ONNX graphs."""
