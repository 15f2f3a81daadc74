"""A DQN family from scratch, as a plugin for Stable-Baselines3 and RL Baselines3 Zoo."""

from sb3_scratch_dqn.algorithm.dqn import ScratchDQN
from sb3_scratch_dqn.networks.policies import CnnPolicy, DQNPolicy, MlpPolicy, MultiInputPolicy
from sb3_scratch_dqn.replay import ScratchReplayBuffer

__version__ = "0.1.0"

__all__ = ["CnnPolicy", "DQNPolicy", "MlpPolicy", "MultiInputPolicy", "ScratchDQN", "ScratchReplayBuffer"]
