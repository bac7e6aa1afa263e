"""Accuracy of quantized networks, sensitivity of their layers, and diversity of synthetic images."""
