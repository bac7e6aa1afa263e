"""Reading and running a network: its graph, BatchNorm folded, one set of operation kinds, one guard, its logits."""
