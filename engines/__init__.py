"""Loaded models behind one protocol: `ort` (ONNX Runtime), `trt` (TensorRT), `eager` (PyTorch, the reference), `fake`."""
