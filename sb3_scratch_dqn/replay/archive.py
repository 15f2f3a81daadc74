"""Replay buffers as files of plain arrays.

A file is a ZIP archive, like NumPy's ``.npz`` files: ``header.json`` has the settings of the buffer, and ``NAME.npy``
one array each. It contains no pickles, so reading a file runs no code from it.
"""

import hashlib
import json
import zipfile
import zlib
from typing import IO, Any

import numpy as np
import torch as th
from gymnasium import spaces

from sb3_scratch_dqn.common.check_spaces import Space
from sb3_scratch_dqn.common.files import Path, open_for_writing
from sb3_scratch_dqn.replay.buffer import ScratchReplayBuffer
from sb3_scratch_dqn.replay.frame_layout import Stacking
from sb3_scratch_dqn.replay.frames import StackedFrames
from sb3_scratch_dqn.replay.observations import Array
from sb3_scratch_dqn.replay.samplers import PrioritizedSampler

SUFFIX = ".npz"

_FORMAT, _VERSION = "sb3-scratch-dqn replay buffer", 1
_HEADER, _ARRAY_SUFFIX = "header.json", ".npy"
# Bounds of spaces with more elements are stored as a checksum
_MAX_BOUNDS = 64


def write_replay_buffer(buffer: ScratchReplayBuffer, path: Path) -> None:
    """Write a replay buffer.

    :param buffer: the buffer
    :param path: a path, which gets the suffix ``.npz`` if it has none, or a binary file that is open for writing
    :raises OSError: if the file cannot be written; an existing file is then unchanged
    """
    arrays = buffer.store.arrays(buffer.used_rows)
    header: dict[str, Any] = {
        "format": _FORMAT,
        "version": _VERSION,
        "buffer_size": buffer.buffer_size * buffer.n_envs,
        "n_envs": buffer.n_envs,
        "pos": buffer.pos,
        "full": buffer.full,
        "optimize_memory_usage": buffer.optimize_memory_usage,
        "handle_timeout_termination": buffer.handle_timeout_termination,
        "n_steps": buffer.n_steps,
        "gamma": buffer.gamma,
        "stacking": None,
        "sampler": None,
        "observation_space": describe_space(buffer.observation_space),
        "action_space": describe_space(buffer.action_space),
    }
    if isinstance(buffer.store.obs_store, StackedFrames) and buffer.stacking is not None:
        axes = buffer.stacking.axes
        header["stacking"] = {**buffer.stacking._asdict(), "axes": axes if isinstance(axes, int) else dict(axes)}
    if isinstance(buffer.sampler, PrioritizedSampler):
        header["sampler"] = buffer.sampler.settings()
        arrays["priorities"] = buffer.sampler.tree.values[: buffer.used_rows * buffer.n_envs]
    with open_for_writing(path, SUFFIX) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(_HEADER, json.dumps(header, indent=1, default=_to_python))
        for name, array in arrays.items():
            with archive.open(name + _ARRAY_SUFFIX, "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.ascontiguousarray(array), allow_pickle=False)


def is_replay_archive(file: IO[bytes]) -> bool:
    """Return True if a file begins like those of :func:`write_replay_buffer`; the file position is restored."""
    position = file.tell()
    magic = file.read(4)
    file.seek(position)
    return magic == b"PK\x03\x04"


def read_replay_archive(
    file: IO[bytes], label: str, observation_space: Space, action_space: spaces.Discrete, n_envs: int, device: th.device
) -> ScratchReplayBuffer:
    """Read a file of :func:`write_replay_buffer`.

    :param file: the open file
    :param label: name of the file in error messages
    :param observation_space: required observation space
    :param action_space: required action space
    :param n_envs: required number of environments
    :param device: device of sampled tensors
    :raises ValueError: if it is not such a file, is truncated or damaged, or does not have the required spaces or
        number of environments
    """
    header, arrays = _read(file, label)
    for name, required in (("observation_space", observation_space), ("action_space", action_space)):
        stored = header.get(name)
        if not isinstance(stored, dict) or _without_text(stored) != _without_text(describe_space(required)):
            text = stored.get("text") if isinstance(stored, dict) else None
            raise ValueError(f"{label} has the {name.replace('_', ' ')} {text}, but the model's is {required}")
    if header.get("n_envs") != n_envs:
        raise ValueError(f"{label} has n_envs={header.get('n_envs')}, but must have n_envs={n_envs}, as the model")
    try:
        return _restore(header, arrays, observation_space, action_space, n_envs, device)
    except (ValueError, KeyError, TypeError, ArithmeticError, MemoryError) as error:
        raise ValueError(f"{label} is inconsistent: {error}") from error


def _restore(
    header: dict[str, Any],
    arrays: dict[str, Array],
    observation_space: Space,
    action_space: spaces.Discrete,
    n_envs: int,
    device: th.device,
) -> ScratchReplayBuffer:
    sampler = header["sampler"]
    settings = {} if sampler is None else {name: sampler[name] for name in ("alpha", "beta", "beta_final", "epsilon")}
    buffer = ScratchReplayBuffer(
        int(header["buffer_size"]),
        observation_space,
        action_space,
        device=device,
        n_envs=n_envs,
        optimize_memory_usage=bool(header["optimize_memory_usage"]),
        handle_timeout_termination=bool(header["handle_timeout_termination"]),
        n_steps=int(header["n_steps"]),
        gamma=float(header["gamma"]),
        stacking=None if header["stacking"] is None else Stacking(**header["stacking"]),
        prioritized=sampler is not None,
        **settings,
    )
    buffer.pos, buffer.full = int(header["pos"]), bool(header["full"])
    if not 0 <= buffer.pos < buffer.buffer_size:
        raise ValueError(f"pos={buffer.pos} is outside of its {buffer.buffer_size} rows")
    buffer.store.restore(arrays, buffer.used_rows, buffer.pos, int(action_space.n))
    actions = buffer.store.actions
    if len(actions) > 0 and not (actions.min() >= 0 and actions.max() < action_space.n):
        raise ValueError(f"its array 'actions' must be in 0 to {int(action_space.n) - 1}")
    if isinstance(buffer.sampler, PrioritizedSampler):
        buffer.sampler.restore(sampler, arrays["priorities"], buffer.used_rows * n_envs)
    return buffer


def _read(file: IO[bytes], label: str) -> tuple[dict[str, Any], dict[str, Array]]:
    arrays = {}
    try:
        with zipfile.ZipFile(file) as archive:
            header = json.loads(archive.read(_HEADER))
            for name in archive.namelist():
                if name.endswith(_ARRAY_SUFFIX):
                    with archive.open(name) as member:
                        arrays[name.removesuffix(_ARRAY_SUFFIX)] = np.lib.format.read_array(member, allow_pickle=False)
    except (
        *(zipfile.BadZipFile, zlib.error, EOFError, OSError),
        *(KeyError, ValueError, RuntimeError, NotImplementedError, MemoryError),
    ) as error:
        raise ValueError(f"{label} is not a replay buffer file, or is truncated: {error}") from error
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        raise ValueError(f'{label} is not a replay buffer file: its header must have "format": "{_FORMAT}"')
    if header.get("version") != _VERSION:
        raise ValueError(
            f"{label} has version {header.get('version')!r} of the format, but this package reads version {_VERSION}"
        )
    return header, arrays


def describe_space(space: Space) -> dict[str, Any]:
    """Return all properties that distinguish a space from others, for JSON; ``text`` is only for messages."""
    described: dict[str, Any] = {"type": type(space).__name__, "text": str(space)}
    if isinstance(space, spaces.Dict):
        described["spaces"] = {key: describe_space(part) for key, part in space.spaces.items()}
    elif isinstance(space, spaces.Box):
        described.update(shape=list(space.shape), dtype=str(space.dtype))
        described.update(low=_bounds(space.low), high=_bounds(space.high))
    elif isinstance(space, spaces.Discrete):
        described.update(n=int(space.n), start=int(space.start))
    elif isinstance(space, spaces.MultiDiscrete):
        described.update(nvec=space.nvec.tolist())
    elif isinstance(space, spaces.MultiBinary):
        described.update(shape=list(space.shape))
    return described


def _without_text(described: dict[str, Any]) -> dict[str, Any]:
    return {
        name: {key: _without_text(part) for key, part in value.items()} if name == "spaces" else value
        for name, value in described.items()
        if name != "text"
    }


def _bounds(array: Array) -> list[float] | str:
    if array.size <= _MAX_BOUNDS:
        values: list[float] = array.reshape(-1).astype(float).tolist()
        return values
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def _to_python(value: Any) -> Any:
    """Convert a NumPy scalar for JSON."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{value!r} cannot be written to a header")
