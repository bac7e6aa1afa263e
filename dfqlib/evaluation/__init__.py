"""How good a quantized network and its synthetic images are, and where the loss comes from."""
