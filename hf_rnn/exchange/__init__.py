"""Models and weights from and to other libraries: torch.nn, FlashRNN, torch.export, ONNX."""
