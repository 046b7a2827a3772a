"""Sizes from which on something is done another way, where what computes and what says beforehand what that costs must agree."""

# Rows of a Kronecker factor (metagrad.curvature). Ours: 8192 inputs, Llama-3.2-1B's widest, and a bias; 0.27 GB in float32.
LARGEST_FACTOR = 8193
