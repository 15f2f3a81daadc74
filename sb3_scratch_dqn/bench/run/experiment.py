"""One run of a comparison, in a process of its own: ``python -m sb3_scratch_dqn.bench.run.experiment``, run on stdin.

A process of its own gives each run clean random generators and a peak of memory that is its own, and whatever ends it
ends nothing else.
"""

import importlib
import json
import os
import sys
import tempfile
import time
import traceback
import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv, sync_envs_normalization

from sb3_scratch_dqn.bench.machine import end_with, origin, peak_memory
from sb3_scratch_dqn.bench.run.plan import FORMAT, Run, evaluation_steps, experiment, hyperparameters, split, zoo

# Evaluation must not see the episodes that training sees
_EVALUATION_SEED = 1_000_000


class Evaluate(BaseCallback):
    """Evaluates at fixed steps, and keeps the clock of the training, which stands still meanwhile.

    :param env: the environment to evaluate in
    :param steps: after which to evaluate
    :param episodes: of each evaluation
    :param deterministic: whether the agent acts greedily
    """

    def __init__(self, env: VecEnv, steps: list[int], episodes: int, deterministic: bool) -> None:
        super().__init__()
        self.env, self.steps, self.episodes, self.deterministic = env, steps, episodes, deterministic
        names = ("steps", "seconds", "cpu_seconds", "returns", "lengths", "steps_taken")
        self.curve: dict[str, list[Any]] = {name: [] for name in names}
        self.training_seconds = 0.0
        self._begin = 0.0
        self._cpu_begin = 0.0

    def _on_training_start(self) -> None:
        self._begin, self._cpu_begin = time.perf_counter(), time.process_time()
        self._evaluate()

    def _on_step(self) -> bool:
        # The last evaluation is made when training has ended, after the last update; but what learns from whole
        # rollouts may take many steps more until then
        now = len(self.steps) - (0 if isinstance(self.model, OnPolicyAlgorithm) else 1)
        while len(self.curve["steps"]) < now and self.num_timesteps >= self.steps[len(self.curve["steps"])]:
            self._evaluate()
        return True

    def _on_training_end(self) -> None:
        self.training_seconds = round(time.perf_counter() - self._begin, 3)
        if self.num_timesteps < self.steps[-1]:
            raise RuntimeError(f"training ended after {self.num_timesteps:,} of {self.steps[-1]:,} steps")
        while len(self.curve["steps"]) < len(self.steps):
            self._evaluate()

    def _evaluate(self) -> None:
        now, cpu_now = time.perf_counter(), time.process_time()
        # Of NumPy and torch; the same run without evaluations is to be the same
        states = np.random.get_state(), th.get_rng_state()
        if self.model.get_vec_normalize_env() is not None:
            sync_envs_normalization(self.training_env, self.env)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of environments that are not monitored, which these are
            returns, lengths = evaluate_policy(
                self.model,
                self.env,
                n_eval_episodes=self.episodes,
                deterministic=self.deterministic,
                return_episode_rewards=True,
            )
        np.random.set_state(states[0])
        th.set_rng_state(states[1])
        if not np.isfinite(returns).all():
            raise ValueError(f"an evaluation after {self.num_timesteps:,} steps gave the returns {returns}")
        values = (
            self.steps[len(self.curve["steps"])],
            round(now - self._begin, 3),
            round(cpu_now - self._cpu_begin, 3),
            [round(float(one), 6) for one in returns],  # type: ignore[union-attr]  # a list, as one of each episode was asked for
            [int(one) for one in lengths],  # type: ignore[union-attr]  # likewise
            self.num_timesteps,
        )
        for column, value in zip(self.curve.values(), values, strict=True):
            column.append(value)
        self._begin += time.perf_counter() - now
        self._cpu_begin += time.process_time() - cpu_now


def train(run: Run) -> dict[str, Any]:
    """Train and evaluate.

    :param run: what to train
    :return: what is known of it, ready for JSON
    """
    for package in run.gym_packages:
        importlib.import_module(package)
    if run.device == "cpu":
        # The same file again, should the run be repeated: no kernel is chosen by the clock
        th.use_deterministic_algorithms(True, warn_only=True)
        th.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # it is made so
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        manager, as_in_file, settings = experiment(run, folder)
        env = manager.create_envs(manager.n_envs, no_log=True)
        settings = manager._preprocess_action_noise(settings, as_in_file, env)
        eval_env = manager.create_envs(1, eval_env=True, no_log=True)
        eval_env.seed(_EVALUATION_SEED + run.seed)
        name, _ = split(run.algo)
        model = zoo().ALGOS[name](env=env, seed=run.seed, verbose=0, device=run.device, **settings)
        steps = evaluation_steps(run.n_timesteps, run.n_evaluations)
        evaluate = Evaluate(eval_env, steps, run.eval_episodes, manager.deterministic_eval)
        model.learn(run.n_timesteps, callback=[*manager.callbacks, evaluate])
        env.close()
        eval_env.close()
    return {
        "settings": {
            **run.conditions(),
            "deterministic_evaluation": manager.deterministic_eval,
            "hyperparameters": hyperparameters(as_in_file),
        },
        "reward_threshold": gym.spec(run.env).reward_threshold,  # at which the environment counts as solved
        "engine": getattr(getattr(model, "_engine", None), "title", None),
        "curve": evaluate.curve,
        "steps_taken": model.num_timesteps,  # algorithms may go on to the end of a rollout
        "training_seconds": evaluate.training_seconds,
        "steps_per_second": round(model.num_timesteps / evaluate.training_seconds, 1),
        "peak_memory_bytes": peak_memory(),
    }


def describe(run: Run) -> dict[str, Any]:
    """Say what a run is and where it took place, ready for JSON.

    :param run: the run
    """
    return {
        "format": FORMAT,
        "algo": run.algo,
        "env": run.env,
        "seed": run.seed,
        **origin(run.device),
    }


def main() -> None:
    """Read a run from stdin, train, and write what is known of it to an open file.

    The command line has two numbers: the id of the process that started this one, and the file's descriptor.
    """
    parent, answer = map(int, sys.argv[1:])
    end_with(parent)
    os.set_inheritable(answer, False)
    fields = json.loads(sys.stdin.read())
    run = Run(**{**fields, "gym_packages": tuple(fields["gym_packages"])})
    th.set_num_threads(1)
    begin = time.perf_counter()
    known = describe(run)
    try:
        known.update(status="done", **train(run))
    except Exception as error:
        known.update(status="failed", settings=run.conditions(), error=_told(error))
    known["wall_seconds"] = round(time.perf_counter() - begin, 1)
    with open(answer, "w") as file:
        json.dump(known, file)


def _told(error: BaseException) -> dict[str, str]:
    return {
        "type": type(error).__name__,
        "message": str(error),
        "traceback": "".join(traceback.format_exception(error)),
    }


if __name__ == "__main__":
    main()
