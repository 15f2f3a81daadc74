"""Memory and speed of replay: this package's buffer against SB3's, and its prioritized sampling against cpprb's.

Times are medians over rounds in which the contestants take turns; ratios are medians (and extremes) of the ratios of
single rounds, below 1 where ours is faster.
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

from sb3_scratch_dqn.bench.speed.timing import Comparison, compare, table
from sb3_scratch_dqn.replay import ScratchReplayBuffer, Stacking
from sb3_scratch_dqn.replay.observations import Observation
from sb3_scratch_dqn.replay.samplers import PrioritizedSampler

_VECTOR = spaces.Box(-10, 10, (8,), np.float32)
_NESTED: spaces.Space[Any] = spaces.Dict(
    {"position": spaces.Box(-10, 10, (3,), np.float32), "speed": spaces.Box(-1, 1, (5,), np.float32)}
)
# As AtariWrapper, VecFrameStack and VecTransposeImage make them
_N_STACK = 4
_IMAGES = spaces.Box(0, 255, (_N_STACK, 84, 84), np.uint8)
_STACKING = Stacking(_N_STACK, 0, "zero")
_ACTIONS = spaces.Discrete(4)
_EPISODE = 200  # steps
_N_NUMBERS = 50_000  # transitions of the buffers that hold no images

Step = tuple[Any, ...]


def run(rounds: int, largest: int, n_images: int) -> str:
    """Measure everything, telling on stderr what is going on.

    :param rounds: measurements of each case
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
    for title, part in parts:
        print(f"{title} ...", file=sys.stderr, flush=True)
        texts.append(f"### {title}\n\n{part()}")
    return "\n\n".join(texts)


# Steps to fill the buffers with


def _vectors(n_envs: int) -> list[Step]:
    rng = np.random.default_rng(0)
    observations = rng.uniform(-1, 1, (1001, n_envs, 8)).astype(np.float32)
    return _steps(list(observations), n_envs)


def _nested(n_envs: int) -> list[Step]:
    rng = np.random.default_rng(0)
    return _steps(
        [
            {
                "position": rng.uniform(-1, 1, (n_envs, 3)).astype(np.float32),
                "speed": rng.uniform(-1, 1, (n_envs, 5)).astype(np.float32),
            }
            for _ in range(1001)
        ],
        n_envs,
    )


def _steps(observations: list[Any], n_envs: int) -> list[Step]:
    rng = np.random.default_rng(1)
    return [
        (
            now,
            following,
            rng.integers(0, 4, n_envs),
            rng.normal(size=n_envs),
            np.full(n_envs, count % _EPISODE == _EPISODE - 1),
            [{} for _ in range(n_envs)],
        )
        for count, (now, following) in enumerate(pairwise(observations))
    ]


def _image_steps() -> list[Step]:
    """The steps of an episode of stacked frames, the last of which is truncated."""
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (_EPISODE + 1, 84, 84)).astype(np.uint8)
    padded = np.concatenate([np.zeros((_N_STACK - 1, 84, 84), np.uint8), frames])
    stacks = [padded[None, begin : begin + _N_STACK].copy() for begin in range(_EPISODE + 1)]
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


class _Adding:
    """Adds one step after another to a buffer, over and over."""

    def __init__(self, buffer: ReplayBuffer, steps: list[Step]) -> None:
        self.buffer, self.steps, self.count = buffer, steps, 0

    def __call__(self) -> None:
        self.buffer.add(*self.steps[self.count])
        self.count = (self.count + 1) % len(self.steps)


def _fill(buffer: ReplayBuffer, steps: list[Step], count: int) -> None:
    add = _Adding(buffer, steps)
    for _ in range(count):
        add()


def _ours(capacity: int, space: spaces.Space[Any], n_envs: int = 1, **kwargs: Any) -> ScratchReplayBuffer:
    return ScratchReplayBuffer(capacity, space, _ACTIONS, device="cpu", n_envs=n_envs, **kwargs)


# Memory


def memory(n_images: int) -> str:
    """Bytes of a stacked Atari transition: arrays that were allocated, over transitions."""
    kinds: dict[str, ReplayBuffer] = {
        "SB3 `ReplayBuffer`": ReplayBuffer(n_images, _IMAGES, _ACTIONS, device="cpu"),
        "ours, `frames=False`": _ours(n_images, _IMAGES),
        "ours": _ours(n_images, _IMAGES, stacking=_STACKING),
    }
    sizes = {}
    for name, buffer in kinds.items():
        _fill(buffer, _image_steps(), n_images)
        sizes[name] = sum(array.nbytes for array in _arrays(buffer)) / n_images
    reference = sizes["SB3 `ReplayBuffer`"]
    rows = [[name, f"{size:,.0f}", f"1/{reference / size:.2f}"] for name, size in sizes.items()]
    return table(["Atari, 4 frames of 84x84, episodes of 200 steps", "bytes a transition", "of SB3's"], rows)


def _arrays(buffer: ReplayBuffer) -> list[np.ndarray[Any, Any]]:
    if isinstance(buffer, ScratchReplayBuffer):
        return list(buffer.store.arrays(buffer.buffer_size).values())
    return [value for value in vars(buffer).values() if isinstance(value, np.ndarray)]


# Speed


def against_sb3(rounds: int, n_images: int) -> str:
    """Adding a step, and sampling a batch, each in the way that training does."""

    class Case(NamedTuple):
        name: str
        space: spaces.Space[Any]
        n_envs: int
        steps: list[Step]
        capacity: int
        theirs: type[ReplayBuffer]
        kwargs: dict[str, Any]
        own_kwargs: dict[str, Any]
        batch_size: int

    several_steps, frames = {"n_steps": 3, "gamma": 0.99}, {"stacking": _STACKING}
    images, small = _image_steps(), _N_NUMBERS
    cases = [
        Case("8 numbers", _VECTOR, 1, _vectors(1), small, ReplayBuffer, {}, {}, 32),
        Case("8 numbers", _VECTOR, 1, _vectors(1), small, ReplayBuffer, {}, {}, 256),
        Case("8 numbers, 8 environments", _VECTOR, 8, _vectors(8), small, ReplayBuffer, {}, {}, 128),
        Case("`Dict` of 3 and 5 numbers", _NESTED, 1, _nested(1), small, DictReplayBuffer, {}, {}, 128),
        Case("8 numbers, 3 steps", _VECTOR, 1, _vectors(1), small, NStepReplayBuffer, several_steps, {}, 128),
        Case("Atari, `frames=False`", _IMAGES, 1, images, n_images, ReplayBuffer, {}, {}, 32),
        Case("Atari", _IMAGES, 1, images, n_images, ReplayBuffer, {}, frames, 32),
        Case(
            "Atari, 3 steps",
            _IMAGES,
            1,
            images,
            n_images,
            NStepReplayBuffer,
            several_steps,
            {"stacking": _STACKING},
            32,
        ),
    ]
    rows = []
    for case in cases:
        theirs = case.theirs(case.capacity, case.space, _ACTIONS, device="cpu", n_envs=case.n_envs, **case.kwargs)
        ours = _ours(case.capacity, case.space, case.n_envs, **case.kwargs, **case.own_kwargs)
        for buffer in (theirs, ours):
            # Beyond what fits, so that the buffers are full and go on over their beginning
            _fill(buffer, case.steps, len(case.steps) * -(-case.capacity // case.n_envs // len(case.steps) + 1))
        adding = compare({"ours": _Adding(ours, case.steps), "theirs": _Adding(theirs, case.steps)}, rounds)
        sampling = compare(
            {"ours": partial(ours.sample_batch, case.batch_size), "theirs": partial(theirs.sample, case.batch_size)},
            rounds,
        )
        rows.append([f"{case.name}: add", *_cells(adding)])
        rows.append([f"{case.name}: sample {case.batch_size}", *_cells(sampling)])
        print(f"  {case.name}, {case.batch_size}", file=sys.stderr, flush=True)
    return table(["", "ours", "SB3", "ours / SB3"], rows)


def _cells(comparison: Comparison) -> list[str]:
    ratios = comparison.ratios("ours", "theirs")
    middle = ratios[len(ratios) // 2]
    return [
        *(f"{comparison.median(name) * 1e6:,.0f} us" for name in ("ours", "theirs")),
        f"{middle:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
    ]


def frames_against_dense(rounds: int, n_images: int) -> str:
    """What keeping each frame once costs, or gains, in time."""
    frames, dense = _ours(n_images, _IMAGES, stacking=_STACKING), _ours(n_images, _IMAGES)
    steps = _image_steps()
    for buffer in (frames, dense):
        _fill(buffer, steps, n_images + _EPISODE - n_images % _EPISODE)
    rows = []
    for name, function in (
        ("add", lambda buffer: _Adding(buffer, steps)),
        ("sample 32", lambda buffer: partial(buffer.sample_batch, 32)),
    ):
        comparison = compare({"ours": function(frames), "theirs": function(dense)}, rounds)
        rows.append([f"Atari: {name}", *_cells(comparison)])
    return table(["", "frames once", "in full", "ratio"], rows)


def prioritized(rounds: int, largest: int) -> str:
    """Sampling and giving priorities back together, at several sizes; and adding."""
    sizes = [size for size in (10**4, 10**5, 10**6, 10**7) if size <= largest] or [largest]
    rows, scaling = [], []
    for size in sizes:
        ours = _prioritized_buffer(size)
        theirs = _cpprb(size)
        cells = [f"{size:,}"]
        step = _vectors(1)[0]
        add = compare({"ours": partial(ours.add, *step)}, rounds)
        cells.append(f"{add.median('ours') * 1e6:,.1f} us")
        for batch_size in (32, 256):
            cycle: dict[str, Callable[[], None]] = {"ours": partial(_cycle, ours, batch_size, th.rand(batch_size))}
            if theirs is not None:
                cycle["theirs"] = partial(theirs, batch_size, np.random.default_rng(0).uniform(0, 1, batch_size))
            comparison = compare(cycle, rounds)
            cells.append(f"{comparison.median('ours') * 1e6:,.0f} us")
            if theirs is not None:
                rows.append([f"{size:,}", str(batch_size), *_cells(comparison)])
        scaling.append(cells)
        print(f"  {size:,}", file=sys.stderr, flush=True)
    text = table(["transitions", "add", "sample 32, give back", "sample 256, give back"], scaling)
    if not rows:
        return text + "\n\ncpprb is not installed, so it was not compared with."
    return text + "\n\n" + table(["transitions", "batch", "ours", "cpprb", "ours / cpprb"], rows)


def _prioritized_buffer(size: int) -> ScratchReplayBuffer:
    buffer = _ours(size, _VECTOR, prioritized=True)
    _fill(buffer, _vectors(1), 2)
    # The rest at once: Python would take minutes for ten million
    buffer.store.reserve(size)
    assert isinstance(buffer.sampler, PrioritizedSampler)
    buffer.sampler.tree.reserve(size)
    buffer.sampler.update(np.arange(size), np.zeros(size, dtype=int), th.rand(size, dtype=th.float64))
    buffer.pos, buffer.full = 0, True
    return buffer


def _cycle(buffer: ScratchReplayBuffer, batch_size: int, priorities: th.Tensor) -> None:
    buffer.update_priorities(buffer.sample_batch(batch_size), priorities)


def _cpprb(size: int) -> Callable[[int, np.ndarray[Any, Any]], None] | None:
    """The same with cpprb's buffer, filled alike; ``None`` if it is not installed."""
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
    for begin in range(0, size, 10**5):
        count = min(10**5, size - begin)
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
