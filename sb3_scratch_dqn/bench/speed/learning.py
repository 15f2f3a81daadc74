"""Speed of training: this package's engines against SB3's DQN and, if it is installed, SBX's.

Each contestant trains in its own process with one thread. All processes are pinned to the same processor core and are
measured in turn, round after round. Times are medians over rounds; ratios are medians (with minimum and maximum) of the
ratios of single rounds, above 1 if ours is faster.
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

from sb3_scratch_dqn.bench.machine import ONE_THREAD, peak_memory, provenance
from sb3_scratch_dqn.bench.speed.results import CaseResult, Measurements, Round

_ZOO_NET = {"net_arch": [256, 256]}

# The Zoo's settings for both LunarLander and Acrobot
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
    """A training task that is measured.

    :param title: the title in tables
    :param env: the id of the environment
    :param steps: environment steps per measurement
    :param settings: keyword arguments of the algorithm, the same for all contestants
    :param policy: the policy, the same for all contestants
    :param n_envs: number of vectorised environments
    """

    title: str
    env: str
    steps: int
    settings: dict[str, Any]
    policy: str = "MlpPolicy"
    n_envs: int = 1

    def with_options(self, n_envs: int | None, train_freq: int | None) -> "Case":
        """Return this case with other settings.

        :param n_envs: number of vectorised environments; ``None`` keeps that of the case
        :param train_freq: calls of ``env.step()`` between updates; ``None`` keeps that of the case
        """
        case = self
        if n_envs is not None:
            title = f"{case.title}, {n_envs} environments"
            case = case._replace(title=title, n_envs=n_envs, steps=max(case.steps, 16 * n_envs))
        if train_freq is not None:
            settings = {**case.settings, "train_freq": train_freq}
            case = case._replace(title=f"{case.title}, train_freq={train_freq}", settings=settings)
        return case


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
    """An environment of images that take no time to create: a few images of Atari's size, repeated."""

    observation_space = gym.spaces.Box(0, 255, (84, 84, 4), np.uint8)
    action_space = gym.spaces.Discrete(6)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode of 100 steps."""
        super().reset(seed=seed)
        self._images = np.random.default_rng(0).integers(0, 256, (10, 84, 84, 4)).astype(np.uint8)
        self._step = 0
        return self._images[0], {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Return the next image."""
        self._step += 1
        return self._images[self._step % 10], float(action), self._step == 100, False, {}


class DictEnv(gym.Env[Any, Any]):
    """An environment of two vectors that take no time to create."""

    observation_space = gym.spaces.Dict(
        {"position": gym.spaces.Box(-1, 1, (3,), np.float32), "speed": gym.spaces.Box(-1, 1, (5,), np.float32)}
    )
    action_space = gym.spaces.Discrete(4)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode of 100 steps."""
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
        """Return the next observation."""
        self._step += 1
        return self._observations[self._step % 10], float(action), self._step == 100, False, {}


_OWN_ENVS: dict[str, type[gym.Env[Any, Any]]] = {"Noise84": NoiseEnv, "Dict": DictEnv}


def select_contestants(names: Sequence[str] | None, device: str) -> list[str]:
    """Return the named contestants, or all that are installed and support the device.

    :param names: ``"sb3"``, ``"sbx"``, or engines of this package; ``None`` for all
    :param device: the training device
    """
    if names:
        return list(names)
    engines = ["eager", "fused"] if device == "cpu" else ["eager", "cuda_graph"]
    return ["sb3", *engines, *(["sbx"] if find_spec("sbx") else [])]


def _make_model(contestant: str, case: Case, device: str) -> Any:
    # Only the library of the contestant is imported, because imports add to the peak memory
    kwargs: dict[str, Any] = dict(case.settings, seed=0)
    # A function instead of an id: SB3 would create environments by id with a render mode, which slows down LunarLander
    make_env: Any = _OWN_ENVS.get(case.env) or partial(gym.make, case.env)
    env = make_vec_env(make_env, n_envs=case.n_envs, seed=0)
    if contestant == "sbx":
        from sbx import DQN as SBX

        return SBX(case.policy, env, **kwargs)
    if contestant == "sb3":
        from stable_baselines3 import DQN

        return DQN(case.policy, env, device=device, **kwargs)
    from sb3_scratch_dqn.algorithm.dqn import ScratchDQN

    return ScratchDQN(case.policy, env, device=device, engine=contestant, **kwargs)


def _worker(connection: Connection, contestant: str, case: Case, device: str, core: int | None) -> None:
    """Warm up, then measure one round for each ``True`` received; send peak memory on ``False``, and errors as text."""
    if core is not None:
        os.sched_setaffinity(0, {core})
    th.set_num_threads(1)
    try:
        model = _make_model(contestant, case, device)
        learning_starts = int(case.settings.get("learning_starts", 100))
        model.learn(learning_starts + case.steps // 2)
        gradient_steps = max(case.settings.get("gradient_steps", 1), 1)
        updates = max(1, min(256, case.steps // 4) // gradient_steps)
        batch_size = case.settings.get("batch_size", 32)
        connection.send(None)
        while connection.recv():
            start = time.perf_counter()
            model.learn(case.steps, reset_num_timesteps=False)
            middle = time.perf_counter()
            for _ in range(updates):
                model.train(gradient_steps=gradient_steps, batch_size=batch_size)
            if device == "cuda":
                th.cuda.synchronize()
            end = time.perf_counter()
            connection.send(Round(middle - start, (end - middle) / updates / gradient_steps))
        connection.send(peak_memory())
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}")


@contextmanager
def _one_thread() -> Iterator[None]:
    """Set the environment variables that limit new processes to one thread."""
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


def measure(case: Case, names: Sequence[str], rounds: int, device: str) -> dict[str, Measurements | str]:
    """Measure contestants in turn.

    :param case: the training task
    :param names: the contestants
    :param rounds: number of measurements of each contestant
    :param device: the training device
    :return: contestant -> its measurements, or the error for which it could not take part
    """
    context = multiprocessing.get_context("spawn")
    core = max(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    connections: dict[str, Connection] = {}
    errors: dict[str, str] = {}
    workers = []

    def receive(name: str) -> Any:
        """Return the next message of a worker, or ``None`` if it failed."""
        try:
            message = connections[name].recv()
        except EOFError:
            message = "its process ended"
        if isinstance(message, str):
            errors[name] = message
            del connections[name]
            return None
        return message

    with _one_thread():
        for name in names:
            connections[name], worker_end = context.Pipe()
            worker = context.Process(target=_worker, args=(worker_end, name, case, device, core), daemon=True)
            worker.start()
            worker_end.close()
            workers.append(worker)
            receive(name)  # waits for the end of its warm-up, which would disturb others
    rounds_of: dict[str, list[Round]] = {name: [] for name in connections}
    for _ in range(rounds):
        for name in list(connections):
            connections[name].send(True)
            measured = receive(name)
            if measured is not None:
                rounds_of[name].append(measured)
    results: dict[str, Measurements | str] = {}
    for name in list(connections):
        connections[name].send(False)
        results[name] = Measurements(rounds_of[name], receive(name))
    for worker in workers:
        worker.join()
    return {name: results.get(name, errors.get(name, "")) for name in names}


def run(cases: Sequence[Case], names: Sequence[str] | None, rounds: int, device: str) -> list[CaseResult]:
    """Measure cases, and print progress on stderr.

    :param cases: the cases, such as those of ``CASES``
    :param names: the contestants, as in :func:`select_contestants`
    :param rounds: number of measurements of each contestant
    :param device: ``"cpu"`` or ``"cuda"``
    """
    results = []
    for case in cases:
        print(f"{case.title} ...", file=sys.stderr, flush=True)
        contestants = measure(case, select_contestants(names, device), rounds, device)
        results.append(CaseResult(case.title, case.steps, contestants, provenance(device)))
        print(results[-1].markdown(), file=sys.stderr, flush=True)
    return results
