"""How observations become outputs ``(B, A, K)``.

- ``q_network``: features, hidden layers, dueling streams; ``implicit``: the network of IQN; ``noisy``: noisy layers
- ``policies``: online network, target network and optimiser
- ``adapter``: other modules in the place of a Q-network
"""

from sb3_scratch_dqn.networks.adapter import ForwardNetwork, as_q_network
from sb3_scratch_dqn.networks.implicit import ImplicitQNetwork, network_class
from sb3_scratch_dqn.networks.noisy import NoisyLinear, noise
from sb3_scratch_dqn.networks.policies import NETWORK_SETTINGS, CnnPolicy, DQNPolicy, MlpPolicy, MultiInputPolicy
from sb3_scratch_dqn.networks.q_network import ActivationFactory, DuelingStreams, LinearFactory, QNetwork

__all__ = [
    "NETWORK_SETTINGS",
    "ActivationFactory",
    "CnnPolicy",
    "DQNPolicy",
    "DuelingStreams",
    "ForwardNetwork",
    "ImplicitQNetwork",
    "LinearFactory",
    "MlpPolicy",
    "MultiInputPolicy",
    "NoisyLinear",
    "QNetwork",
    "as_q_network",
    "network_class",
    "noise",
]
