"""What this package adds to RL Baselines3 Zoo: the algorithm, its settings files, its search space."""

from sb3_scratch_dqn.zoo.registration import register, register_in

__all__ = ["register", "register_in"]
