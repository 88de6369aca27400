"""Loaded graphs with one protocol: `ort` (ONNX Runtime), `trt` (TensorRT), `eager` (PyTorch, the reference), `fake`."""
