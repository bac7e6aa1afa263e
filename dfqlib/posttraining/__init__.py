"""Post-training methods: cross-layer equalization, bias correction, learned rounding."""
