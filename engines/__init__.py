"""Loaded models behind one protocol: `ort` (ONNX Runtime), `eager` (PyTorch, the reference), `fake` (scripted)."""
