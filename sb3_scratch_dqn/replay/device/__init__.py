"""A copy of a replay buffer and its priorities on a GPU, which captured updates read."""

from sb3_scratch_dqn.replay.device.buffer import DeviceReplay
from sb3_scratch_dqn.replay.device.ring import StagingBuffer
from sb3_scratch_dqn.replay.device.tree import DevicePriorities

__all__ = ["DevicePriorities", "DeviceReplay", "StagingBuffer"]
