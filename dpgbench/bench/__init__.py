"""What a method works with: drawing, training, metagradients, policy updates, and the account of it all."""
