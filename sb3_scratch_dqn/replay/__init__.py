"""Stores transitions, samples mini-batches of them, and reads and writes them as files.

- ``buffer``: the replay buffer; ``stores`` holds its columns, ``observations`` the observations
- ``frames``: stacked observations, each frame stored once; ``frame_layout`` and ``frame_pool`` are its parts
- ``samplers``: which transitions are sampled, uniformly or by priority (``sum_tree``); ``sampler_interface`` for others
- ``nstep``: n-step returns; ``batch``: what an update gets; ``source``: where engines get it, from any buffer
- ``archive``: files; ``prefill``: transitions from other sources; ``sb3_buffers``: copies from and to SB3's buffers
- ``device``: a copy on a GPU
"""

from sb3_scratch_dqn.replay.archive import is_replay_archive, read_replay_archive, write_replay_buffer
from sb3_scratch_dqn.replay.batch import ArrayBatch, Batch
from sb3_scratch_dqn.replay.buffer import ScratchReplayBuffer
from sb3_scratch_dqn.replay.frame_layout import NotStackedError, Stacking
from sb3_scratch_dqn.replay.frames import StackedFrames
from sb3_scratch_dqn.replay.observations import (
    Array,
    DenseObservations,
    Observation,
    ObservationStore,
    SharedObservations,
    map_observation,
)
from sb3_scratch_dqn.replay.prefill import Transitions, read_transitions, store_transitions
from sb3_scratch_dqn.replay.sampler_interface import Sampler
from sb3_scratch_dqn.replay.samplers import SAMPLER_SETTINGS, PrioritizedSampler, UniformSampler, make_sampler
from sb3_scratch_dqn.replay.sb3_buffers import SB3_BUFFERS, copy_other_buffer, from_sb3_buffer, to_sb3_buffer
from sb3_scratch_dqn.replay.source import BatchSource, batch_source, check_sampling
from sb3_scratch_dqn.replay.stores import Store

__all__ = [
    "SAMPLER_SETTINGS",
    "SB3_BUFFERS",
    "Array",
    "ArrayBatch",
    "Batch",
    "BatchSource",
    "DenseObservations",
    "NotStackedError",
    "Observation",
    "ObservationStore",
    "PrioritizedSampler",
    "Sampler",
    "ScratchReplayBuffer",
    "SharedObservations",
    "StackedFrames",
    "Stacking",
    "Store",
    "Transitions",
    "UniformSampler",
    "batch_source",
    "check_sampling",
    "copy_other_buffer",
    "from_sb3_buffer",
    "is_replay_archive",
    "make_sampler",
    "map_observation",
    "read_replay_archive",
    "read_transitions",
    "store_transitions",
    "to_sb3_buffer",
    "write_replay_buffer",
]
