"""Read and run a network: its graph, BatchNorm folding, kinds of operations, logits."""
