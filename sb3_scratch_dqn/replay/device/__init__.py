"""A copy of a replay buffer's transitions on a GPU, read by recorded updates."""
