"""Sizes from which on something is done another way, where what computes and what says beforehand what that costs must agree."""

LARGEST_FACTOR = 8193  # of a Kronecker factor (metagrad.curvature); ours: Llama-3.2-1B's 8192 widest inputs and the bias, 0.27 GB in float32
