"""Engines behind one protocol: `ort` (ONNX Runtime), `openvino`, `trt` (TensorRT), `eager` (PyTorch), `fake`."""
