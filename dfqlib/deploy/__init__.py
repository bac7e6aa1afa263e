"""From a fake-quantized network to a file: integers, ONNX, and a file that dfqlib reads back."""
