"""Registration in RL Baselines3 Zoo: the algorithm, its hyperparameter files and its search space."""

from sb3_scratch_dqn.zoo.registration import register, register_in

__all__ = ["register", "register_in"]
