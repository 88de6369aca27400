"""Read untrusted files: text, JSON, TOML, checkpoints, ONNX graphs."""
