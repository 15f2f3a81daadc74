"""Speed of training: this package's engines against SB3's DQN and, where it is installed, SBX's.

Every contestant trains in a process of its own, with one thread on one processor, the same for all; the processes take
turns, round after round. Times are medians over rounds; ratios are medians (and extremes) of the ratios of single
rounds, above 1 where ours is faster.
"""

import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.env_util import make_vec_env

from sb3_scratch_dqn.bench.machine import ONE_THREAD, origin, peak_memory
from sb3_scratch_dqn.bench.speed.results import Figures, Measured, Round

_ZOO_NET = {"net_arch": [256, 256]}


# Of the Zoo, for LunarLander and Acrobot alike
_ZOO_LANDER = {
    "learning_rate": 6.3e-4,
    "batch_size": 128,
    "buffer_size": 50_000,
    "learning_starts": 0,
    "target_update_interval": 250,
    "train_freq": 4,
    "gradient_steps": -1,
    "policy_kwargs": _ZOO_NET,
}


class Case(NamedTuple):
    """What is trained.

    :param title: for people
    :param env: the name of the environment
    :param steps: environment steps of a measurement
    :param settings: of all contestants
    :param policy: likewise
    :param n_envs: environments that are stepped together
    """

    title: str
    env: str
    steps: int
    settings: dict[str, Any]
    policy: str = "MlpPolicy"
    n_envs: int = 1


CASES = {
    "defaults": Case("SB3's defaults, CartPole", "CartPole-v1", 4_000, {}),
    "cartpole": Case(
        "the Zoo's CartPole",
        "CartPole-v1",
        2_560,
        {
            "learning_rate": 2.3e-3,
            "batch_size": 64,
            "buffer_size": 100_000,
            "learning_starts": 1_000,
            "target_update_interval": 10,
            "train_freq": 256,
            "gradient_steps": 128,
            "policy_kwargs": _ZOO_NET,
        },
    ),
    "lunarlander": Case(
        "the Zoo's LunarLander",
        "LunarLander-v3",
        1_000,
        _ZOO_LANDER,
    ),
    "mountaincar": Case(
        "the Zoo's MountainCar",
        "MountainCar-v0",
        2_000,
        {
            "learning_rate": 4e-3,
            "batch_size": 128,
            "buffer_size": 10_000,
            "learning_starts": 1_000,
            "gamma": 0.98,
            "target_update_interval": 600,
            "train_freq": 16,
            "gradient_steps": 8,
            "policy_kwargs": _ZOO_NET,
        },
    ),
    "acrobot": Case(
        "the Zoo's Acrobot",
        "Acrobot-v1",
        1_000,
        _ZOO_LANDER,
    ),
    "cleanrl": Case(
        "CleanRL's `dqn.py` settings, CartPole",
        "CartPole-v1",
        8_000,
        {
            "learning_rate": 2.5e-4,
            "batch_size": 128,
            "buffer_size": 10_000,
            "learning_starts": 1_000,
            "target_update_interval": 500,
            "train_freq": 10,
            "gradient_steps": 1,
            "policy_kwargs": {"net_arch": [120, 84]},
        },
    ),
    "odd": Case(
        "200-100-50 wide, batch 100, an update and a soft target each step, CartPole",
        "CartPole-v1",
        1_000,
        {
            "learning_rate": 1e-3,
            "batch_size": 100,
            "buffer_size": 50_000,
            "learning_starts": 100,
            "tau": 0.005,
            "target_update_interval": 1,
            "train_freq": 1,
            "gradient_steps": 1,
            "policy_kwargs": {"net_arch": [200, 100, 50]},
        },
    ),
    "images": Case(
        "Nature CNN on images of 84 x 84 x 4, an update each 4 steps",
        "Noise84",
        40,
        {"batch_size": 32, "buffer_size": 1_000, "learning_starts": 100},
        "CnnPolicy",
    ),
    "dict": Case("`Dict` observations, SB3's defaults", "Dict", 1_000, {}, "MultiInputPolicy"),
}


class NoiseEnv(gym.Env[Any, Any]):
    """Images that cost nothing: as large as Atari's, and the same few over and over."""

    observation_space = gym.spaces.Box(0, 255, (84, 84, 4), np.uint8)
    action_space = gym.spaces.Discrete(6)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode of 100 steps."""
        super().reset(seed=seed)
        self._images = np.random.default_rng(0).integers(0, 256, (10, 84, 84, 4)).astype(np.uint8)
        self._step = 0
        return self._images[0], {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """The next image."""
        self._step += 1
        return self._images[self._step % 10], float(action), self._step == 100, False, {}


class DictEnv(gym.Env[Any, Any]):
    """Two vectors that cost nothing."""

    observation_space = gym.spaces.Dict(
        {"position": gym.spaces.Box(-1, 1, (3,), np.float32), "speed": gym.spaces.Box(-1, 1, (5,), np.float32)}
    )
    action_space = gym.spaces.Discrete(4)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode of 100 steps."""
        super().reset(seed=seed)
        self._observations = [
            {key: self.np_random.uniform(-1, 1, space.shape).astype(np.float32) for key, space in self._spaces}
            for _ in range(10)
        ]
        self._step = 0
        return self._observations[0], {}

    @property
    def _spaces(self) -> list[tuple[str, Any]]:
        return list(self.observation_space.spaces.items())

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """The next observation."""
        self._step += 1
        return self._observations[self._step % 10], float(action), self._step == 100, False, {}


_OWN_ENVS: dict[str, type[gym.Env[Any, Any]]] = {"Noise84": NoiseEnv, "Dict": DictEnv}


def contestants(names: Sequence[str] | None, device: str) -> list[str]:
    """Who takes part: those named, or all that are installed and serve the device.

    :param names: ``"sb3"``, ``"sbx"``, or an engine of this package
    :param device: where to train
    """
    if names:
        return list(names)
    engines = ["eager", "fused"] if device == "cpu" else ["eager", "cuda_graph"]
    return ["sb3", *engines, *(["sbx"] if find_spec("sbx") else [])]


def _make(contestant: str, case: Case, device: str) -> Any:
    # Only the contestant's own library is imported, for the sake of its peak memory
    common: dict[str, Any] = dict(case.settings, seed=0)
    # Made here rather than by its name: SB3 would have it rendered, which slows LunarLander down as nothing else does
    make_env: Any = _OWN_ENVS.get(case.env) or partial(gym.make, case.env)
    env = make_vec_env(make_env, n_envs=case.n_envs, seed=0)
    if contestant == "sbx":
        from sbx import DQN as SBX

        return SBX(case.policy, env, **common)
    if contestant == "sb3":
        from stable_baselines3 import DQN

        return DQN(case.policy, env, device=device, **common)
    from sb3_scratch_dqn.algorithm.dqn import ScratchDQN

    return ScratchDQN(case.policy, env, device=device, engine=contestant, **common)


def _work(connection: Connection, contestant: str, case: Case, device: str, processor: int | None) -> None:
    """What a process does: warm up, then take a measurement whenever it is told to."""
    if processor is not None:
        os.sched_setaffinity(0, {processor})
    th.set_num_threads(1)
    try:
        model = _make(contestant, case, device)
        starts = int(case.settings.get("learning_starts", 100))
        model.learn(starts + case.steps // 2)
        gradient_steps = max(case.settings.get("gradient_steps", 1), 1)
        updates = max(1, min(256, case.steps // 4) // gradient_steps)
        batch_size = case.settings.get("batch_size", 32)
        connection.send(None)
        while connection.recv():
            begin = time.perf_counter()
            model.learn(case.steps, reset_num_timesteps=False)
            middle = time.perf_counter()
            for _ in range(updates):
                model.train(gradient_steps=gradient_steps, batch_size=batch_size)
            if device == "cuda":
                th.cuda.synchronize()
            end = time.perf_counter()
            connection.send(Round(middle - begin, (end - middle) / updates / gradient_steps))
        connection.send(peak_memory())
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}")


@contextmanager
def _one_thread() -> Iterator[None]:
    before = {name: os.environ.get(name) for name in ONE_THREAD}
    os.environ.update(ONE_THREAD)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def measure(case: Case, names: Sequence[str], rounds: int, device: str) -> dict[str, Figures | str]:
    """Let the contestants take turns.

    :param case: what they train
    :param names: of the contestants
    :param rounds: how often each is measured
    :param device: where they train
    :return: what was measured of each, or why it could not take part
    """
    processes = multiprocessing.get_context("spawn")
    processor = max(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    lines: dict[str, Connection] = {}
    failed: dict[str, str] = {}
    workers = []

    def answer(name: str) -> Any:
        try:
            said = lines[name].recv()
        except EOFError:
            said = "its process ended"
        if isinstance(said, str):
            failed[name] = said
            del lines[name]
            return None
        return said

    with _one_thread():
        for name in names:
            lines[name], theirs = processes.Pipe()
            worker = processes.Process(target=_work, args=(theirs, name, case, device, processor), daemon=True)
            worker.start()
            theirs.close()
            workers.append(worker)
            answer(name)  # one after another: who warms up is not to disturb who is measured
    taken: dict[str, list[Round]] = {name: [] for name in lines}
    for _ in range(rounds):
        for name in list(lines):
            lines[name].send(True)
            said = answer(name)
            if said is not None:
                taken[name].append(said)
    figures: dict[str, Figures | str] = {}
    for name in list(lines):
        lines[name].send(False)
        figures[name] = Figures(taken[name], answer(name))
    for worker in workers:
        worker.join()
    return {name: figures.get(name, failed.get(name, "")) for name in names}


def changed(case: Case, n_envs: int | None, train_freq: int | None) -> Case:
    """A case with other settings.

    :param case: the case
    :param n_envs: environments that are stepped together; ``None`` for its own
    :param train_freq: calls of ``env.step()`` between updates; likewise
    """
    if n_envs is not None:
        title = f"{case.title}, {n_envs} environments"
        case = case._replace(title=title, n_envs=n_envs, steps=max(case.steps, 16 * n_envs))
    if train_freq is not None:
        settings = {**case.settings, "train_freq": train_freq}
        case = case._replace(title=f"{case.title}, train_freq={train_freq}", settings=settings)
    return case


def run(cases: Sequence[Case], names: Sequence[str] | None, rounds: int, device: str) -> list[Measured]:
    """Measure some cases, telling on stderr what is going on.

    :param cases: such as those in ``CASES``
    :param names: of the contestants, as in :func:`contestants`
    :param rounds: how often each is measured
    :param device: ``"cpu"`` or ``"cuda"``
    """
    measured = []
    for case in cases:
        print(f"{case.title} ...", file=sys.stderr, flush=True)
        figures = measure(case, contestants(names, device), rounds, device)
        measured.append(Measured(case.title, case.steps, figures, origin(device)))
        print(measured[-1].markdown(), file=sys.stderr, flush=True)
    return measured
