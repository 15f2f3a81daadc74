"""What the network's outputs mean, and what they should have been: heads, targets, masks."""
