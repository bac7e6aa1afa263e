"""What helps before any training: equalized channels, corrected biases, learned rounding."""
