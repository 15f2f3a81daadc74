"""Memory and speed of replay: this package's buffer against SB3's, and its prioritized sampling against cpprb's.

Contestants are measured in turn. Times are medians over rounds; ratios are medians (with minimum and maximum) of the
ratios of single rounds, below 1 if ours is faster.
"""

import sys
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictReplayBuffer, NStepReplayBuffer, ReplayBuffer

from sb3_scratch_dqn.bench.speed.timing import Timings, table, time_in_turn
from sb3_scratch_dqn.replay import ScratchReplayBuffer, Stacking
from sb3_scratch_dqn.replay.observations import Observation
from sb3_scratch_dqn.replay.samplers import PrioritizedSampler

_VECTOR = spaces.Box(-10, 10, (8,), np.float32)
_DICT: spaces.Space[Any] = spaces.Dict(
    {"position": spaces.Box(-10, 10, (3,), np.float32), "speed": spaces.Box(-1, 1, (5,), np.float32)}
)
# As created by AtariWrapper, VecFrameStack and VecTransposeImage
_N_STACK = 4
_IMAGES = spaces.Box(0, 255, (_N_STACK, 84, 84), np.uint8)
_STACKING = Stacking(_N_STACK, 0, "zero")
_ACTIONS = spaces.Discrete(4)
_EPISODE = 200  # steps
_VECTOR_CAPACITY = 50_000  # transitions of the buffers without images

# The arguments of ReplayBuffer.add()
Step = tuple[Any, ...]


def run(rounds: int, largest: int, n_images: int) -> str:
    """Measure everything, and print progress on stderr.

    :param rounds: number of measurements of each case
    :param largest: transitions of the largest prioritized buffer
    :param n_images: transitions of the buffers of images
    :return: the tables, in Markdown
    """
    parts: list[tuple[str, Callable[[], str]]] = [
        ("Memory", lambda: memory(n_images)),
        ("Adding and sampling against SB3", lambda: against_sb3(rounds, n_images)),
        ("Frames against full observations", lambda: frames_against_dense(rounds, n_images)),
        ("Prioritized sampling", lambda: prioritized(rounds, largest)),
    ]
    texts = []
    for title, measure in parts:
        print(f"{title} ...", file=sys.stderr, flush=True)
        texts.append(f"### {title}\n\n{measure()}")
    return "\n\n".join(texts)


# Steps to add to the buffers


def _vector_steps(n_envs: int) -> list[Step]:
    rng = np.random.default_rng(0)
    observations = rng.uniform(-1, 1, (1001, n_envs, 8)).astype(np.float32)
    return _make_steps(list(observations), n_envs)


def _dict_steps(n_envs: int) -> list[Step]:
    rng = np.random.default_rng(0)
    return _make_steps(
        [
            {
                "position": rng.uniform(-1, 1, (n_envs, 3)).astype(np.float32),
                "speed": rng.uniform(-1, 1, (n_envs, 5)).astype(np.float32),
            }
            for _ in range(1001)
        ],
        n_envs,
    )


def _make_steps(observations: list[Any], n_envs: int) -> list[Step]:
    rng = np.random.default_rng(1)
    return [
        (
            observation,
            next_observation,
            rng.integers(0, 4, n_envs),
            rng.normal(size=n_envs),
            np.full(n_envs, count % _EPISODE == _EPISODE - 1),
            [{} for _ in range(n_envs)],
        )
        for count, (observation, next_observation) in enumerate(pairwise(observations))
    ]


def _image_steps() -> list[Step]:
    """Return the steps of one truncated episode of stacked frames."""
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (_EPISODE + 1, 84, 84)).astype(np.uint8)
    padded = np.concatenate([np.zeros((_N_STACK - 1, 84, 84), np.uint8), frames])
    stacks = [padded[None, start : start + _N_STACK].copy() for start in range(_EPISODE + 1)]
    return [
        (
            stacks[count],
            stacks[count + 1],
            np.array([count % 4]),
            np.array([1.0]),
            np.array([count == _EPISODE - 1]),
            [{"TimeLimit.truncated": count == _EPISODE - 1}],
        )
        for count in range(_EPISODE)
    ]


class _Adder:
    """Add steps to a buffer, one per call, in a cycle."""

    def __init__(self, buffer: ReplayBuffer, steps: list[Step]) -> None:
        self.buffer, self.steps, self.count = buffer, steps, 0

    def __call__(self) -> None:
        self.buffer.add(*self.steps[self.count])
        self.count = (self.count + 1) % len(self.steps)


def _fill(buffer: ReplayBuffer, steps: list[Step], count: int) -> None:
    add = _Adder(buffer, steps)
    for _ in range(count):
        add()


def _scratch_buffer(capacity: int, space: spaces.Space[Any], n_envs: int = 1, **kwargs: Any) -> ScratchReplayBuffer:
    return ScratchReplayBuffer(capacity, space, _ACTIONS, device="cpu", n_envs=n_envs, **kwargs)


# Memory


def memory(n_images: int) -> str:
    """Measure the memory of an Atari transition: bytes of all allocated arrays divided by the number of transitions."""
    kinds: dict[str, ReplayBuffer] = {
        "SB3 `ReplayBuffer`": ReplayBuffer(n_images, _IMAGES, _ACTIONS, device="cpu"),
        "ours, `frames=False`": _scratch_buffer(n_images, _IMAGES),
        "ours": _scratch_buffer(n_images, _IMAGES, stacking=_STACKING),
    }
    sizes = {}
    for name, buffer in kinds.items():
        _fill(buffer, _image_steps(), n_images)
        sizes[name] = sum(array.nbytes for array in _arrays(buffer)) / n_images
    reference = sizes["SB3 `ReplayBuffer`"]
    rows = [[name, f"{size:,.0f}", f"1/{reference / size:.2f}"] for name, size in sizes.items()]
    return table(["Atari, 4 frames of 84x84, episodes of 200 steps", "bytes per transition", "of SB3's"], rows)


def _arrays(buffer: ReplayBuffer) -> list[np.ndarray[Any, Any]]:
    if isinstance(buffer, ScratchReplayBuffer):
        return list(buffer.store.arrays(buffer.buffer_size).values())
    return [value for value in vars(buffer).values() if isinstance(value, np.ndarray)]


# Speed


class _Case(NamedTuple):
    name: str
    space: spaces.Space[Any]
    n_envs: int
    steps: list[Step]
    capacity: int
    sb3_class: type[ReplayBuffer]
    kwargs: dict[str, Any]  # of both buffers
    our_kwargs: dict[str, Any]  # of ours only
    batch_size: int


def _cases(n_images: int) -> list[_Case]:
    three_steps, stacked = {"n_steps": 3, "gamma": 0.99}, {"stacking": _STACKING}
    vectors, images, small = _vector_steps(1), _image_steps(), _VECTOR_CAPACITY
    return [
        _Case("8 numbers", _VECTOR, 1, vectors, small, ReplayBuffer, {}, {}, 32),
        _Case("8 numbers", _VECTOR, 1, vectors, small, ReplayBuffer, {}, {}, 256),
        _Case("8 numbers, 8 environments", _VECTOR, 8, _vector_steps(8), small, ReplayBuffer, {}, {}, 128),
        _Case("`Dict` of 3 and 5 numbers", _DICT, 1, _dict_steps(1), small, DictReplayBuffer, {}, {}, 128),
        _Case("8 numbers, 3 steps", _VECTOR, 1, vectors, small, NStepReplayBuffer, three_steps, {}, 128),
        _Case("Atari, `frames=False`", _IMAGES, 1, images, n_images, ReplayBuffer, {}, {}, 32),
        _Case("Atari", _IMAGES, 1, images, n_images, ReplayBuffer, {}, stacked, 32),
        _Case("Atari, 3 steps", _IMAGES, 1, images, n_images, NStepReplayBuffer, three_steps, stacked, 32),
    ]


def against_sb3(rounds: int, n_images: int) -> str:
    """Measure adding a step and sampling a batch, each as in training."""
    rows = []
    for case in _cases(n_images):
        theirs = case.sb3_class(case.capacity, case.space, _ACTIONS, device="cpu", n_envs=case.n_envs, **case.kwargs)
        ours = _scratch_buffer(case.capacity, case.space, case.n_envs, **case.kwargs, **case.our_kwargs)
        for buffer in (theirs, ours):
            # More than the capacity, so that the buffers are full and overwrite old transitions
            _fill(buffer, case.steps, len(case.steps) * -(-case.capacity // case.n_envs // len(case.steps) + 1))
        adding = time_in_turn({"ours": _Adder(ours, case.steps), "theirs": _Adder(theirs, case.steps)}, rounds)
        sampling = time_in_turn(
            {"ours": partial(ours.sample_batch, case.batch_size), "theirs": partial(theirs.sample, case.batch_size)},
            rounds,
        )
        rows.append([f"{case.name}: add", *_cells(adding)])
        rows.append([f"{case.name}: sample {case.batch_size}", *_cells(sampling)])
        print(f"  {case.name}, {case.batch_size}", file=sys.stderr, flush=True)
    return table(["", "ours", "SB3", "ours / SB3"], rows)


def _cells(timings: Timings) -> list[str]:
    ratios = timings.ratios("ours", "theirs")
    median = ratios[len(ratios) // 2]
    return [
        *(f"{timings.median(name) * 1e6:,.0f} us" for name in ("ours", "theirs")),
        f"{median:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
    ]


def frames_against_dense(rounds: int, n_images: int) -> str:
    """Measure the time that storing each frame once costs or saves."""
    frames, dense = _scratch_buffer(n_images, _IMAGES, stacking=_STACKING), _scratch_buffer(n_images, _IMAGES)
    steps = _image_steps()
    for buffer in (frames, dense):
        _fill(buffer, steps, n_images + _EPISODE - n_images % _EPISODE)
    rows = []
    for name, make_call in (
        ("add", lambda buffer: _Adder(buffer, steps)),
        ("sample 32", lambda buffer: partial(buffer.sample_batch, 32)),
    ):
        timings = time_in_turn({"ours": make_call(frames), "theirs": make_call(dense)}, rounds)
        rows.append([f"Atari: {name}", *_cells(timings)])
    return table(["", "frames once", "full observations", "ratio"], rows)


def prioritized(rounds: int, largest: int) -> str:
    """Measure adding, and sampling together with updating the priorities, at several sizes."""
    sizes = [size for size in (10**4, 10**5, 10**6, 10**7) if size <= largest] or [largest]
    rows, cpprb_rows = [], []
    for size in sizes:
        ours = _prioritized_buffer(size)
        theirs = _cpprb_cycle(size)
        adding = time_in_turn({"ours": partial(ours.add, *_vector_steps(1)[0])}, rounds)
        row = [f"{size:,}", f"{adding.median('ours') * 1e6:,.1f} us"]
        for batch_size in (32, 256):
            cycles: dict[str, Callable[[], None]] = {"ours": partial(_cycle, ours, batch_size, th.rand(batch_size))}
            if theirs is not None:
                cycles["theirs"] = partial(theirs, batch_size, np.random.default_rng(0).uniform(0, 1, batch_size))
            timings = time_in_turn(cycles, rounds)
            row.append(f"{timings.median('ours') * 1e6:,.0f} us")
            if theirs is not None:
                cpprb_rows.append([f"{size:,}", str(batch_size), *_cells(timings)])
        rows.append(row)
        print(f"  {size:,}", file=sys.stderr, flush=True)
    text = table(["transitions", "add", "sample and update 32", "sample and update 256"], rows)
    if not cpprb_rows:
        return text + "\n\nNot compared with cpprb, which is not installed."
    return text + "\n\n" + table(["transitions", "batch", "ours", "cpprb", "ours / cpprb"], cpprb_rows)


def _prioritized_buffer(size: int) -> ScratchReplayBuffer:
    buffer = _scratch_buffer(size, _VECTOR, prioritized=True)
    _fill(buffer, _vector_steps(1), 2)
    # The rest in one call: adding ten million transitions one by one would take minutes
    buffer.store.reserve(size)
    assert isinstance(buffer.sampler, PrioritizedSampler)
    buffer.sampler.tree.reserve(size)
    buffer.sampler.update(np.arange(size), np.zeros(size, dtype=int), th.rand(size, dtype=th.float64))
    buffer.pos, buffer.full = 0, True
    return buffer


def _cycle(buffer: ScratchReplayBuffer, batch_size: int, priorities: th.Tensor) -> None:
    buffer.update_priorities(buffer.sample_batch(batch_size), priorities)


def _cpprb_cycle(size: int) -> Callable[[int, np.ndarray[Any, Any]], None] | None:
    """Return the equivalent of :func:`_cycle` for a full buffer of cpprb, or ``None`` if cpprb is not installed."""
    try:
        import cpprb
    except ImportError:
        return None
    observation = {"shape": 8, "dtype": np.float32}
    buffer = cpprb.PrioritizedReplayBuffer(
        size,
        {"obs": observation, "act": {"dtype": np.int64}, "rew": {}, "next_obs": observation, "done": {}},
        alpha=0.6,
    )
    rng = np.random.default_rng(0)
    for start in range(0, size, 10**5):
        count = min(10**5, size - start)
        zeros: Observation = np.zeros((count, 8), np.float32)
        buffer.add(
            obs=zeros,
            act=np.zeros(count),
            rew=np.zeros(count),
            next_obs=zeros,
            done=np.zeros(count),
            priorities=rng.uniform(0, 1, count),
        )

    def cycle(batch_size: int, priorities: np.ndarray[Any, Any]) -> None:
        sample = buffer.sample(batch_size, beta=0.4)
        buffer.update_priorities(sample["indexes"], priorities)

    return cycle
