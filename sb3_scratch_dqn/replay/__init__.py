"""Replay: where transitions are kept and how updates get them."""

from sb3_scratch_dqn.replay.batch import ArrayBatch, Batch
from sb3_scratch_dqn.replay.buffer import BatchSource, ScratchReplayBuffer, batch_source, check_sampling
from sb3_scratch_dqn.replay.frames import NotStackedError, Stacking

__all__ = [
    "ArrayBatch",
    "Batch",
    "BatchSource",
    "NotStackedError",
    "ScratchReplayBuffer",
    "Stacking",
    "batch_source",
    "check_sampling",
]
