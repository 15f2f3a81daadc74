"""``ScratchDQN``: its settings, rollouts, exploration, training, saving, and conversion from and to SB3's DQN."""
