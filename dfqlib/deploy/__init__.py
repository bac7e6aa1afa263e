"""Integer simulation of a fake-quantized network, its export to ONNX, and files that dfqlib loads again."""
