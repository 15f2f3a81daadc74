"""One run of a comparison, in its own process: ``python -m sb3_scratch_dqn.bench.run.experiment``, the run on stdin.

A separate process gives each run fresh random generators and its own peak memory, and a crash ends only this run.
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

from sb3_scratch_dqn.bench.machine import exit_with_parent, peak_memory, provenance
from sb3_scratch_dqn.bench.run.plan import (
    FILE_FORMAT,
    Run,
    evaluation_steps,
    import_zoo,
    json_hyperparameters,
    load_settings,
    split_algo,
)

# Added to the seed of the run: evaluation must not use the episodes of training
_EVALUATION_SEED = 1_000_000


class EvaluationCallback(BaseCallback):
    """Evaluate at fixed steps, and measure the training time without the evaluations.

    :param env: the evaluation environment
    :param steps: the environment steps after which to evaluate
    :param episodes: episodes per evaluation
    :param deterministic: whether the agent acts greedily
    """

    def __init__(self, env: VecEnv, steps: list[int], episodes: int, deterministic: bool) -> None:
        super().__init__()
        self.env, self.steps, self.episodes, self.deterministic = env, steps, episodes, deterministic
        names = ("steps", "seconds", "cpu_seconds", "returns", "lengths", "steps_taken")
        self.curve: dict[str, list[Any]] = {name: [] for name in names}
        self.training_seconds = 0.0
        self._start = 0.0
        self._cpu_start = 0.0

    def _on_training_start(self) -> None:
        self._start, self._cpu_start = time.perf_counter(), time.process_time()
        self._evaluate()

    def _on_step(self) -> bool:
        # The last evaluation follows the last update, at the end of training. On-policy algorithms are the exception:
        # they may take many more steps to complete a rollout
        due = len(self.steps) - (0 if isinstance(self.model, OnPolicyAlgorithm) else 1)
        while len(self.curve["steps"]) < due and self.num_timesteps >= self.steps[len(self.curve["steps"])]:
            self._evaluate()
        return True

    def _on_training_end(self) -> None:
        self.training_seconds = round(time.perf_counter() - self._start, 3)
        if self.num_timesteps < self.steps[-1]:
            raise RuntimeError(f"training ended after {self.num_timesteps:,} of {self.steps[-1]:,} steps")
        while len(self.curve["steps"]) < len(self.steps):
            self._evaluate()

    def _evaluate(self) -> None:
        now, cpu_now = time.perf_counter(), time.process_time()
        # Restored below, because evaluations must not change the training
        numpy_state, torch_state = np.random.get_state(), th.get_rng_state()
        if self.model.get_vec_normalize_env() is not None:
            sync_envs_normalization(self.training_env, self.env)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the evaluation environment has no Monitor wrapper
            returns, lengths = evaluate_policy(
                self.model,
                self.env,
                n_eval_episodes=self.episodes,
                deterministic=self.deterministic,
                return_episode_rewards=True,
            )
        np.random.set_state(numpy_state)
        th.set_rng_state(torch_state)
        if not np.isfinite(returns).all():
            raise ValueError(
                f"returns must be finite, but an evaluation after {self.num_timesteps:,} steps gave {returns}"
            )
        values = (
            self.steps[len(self.curve["steps"])],
            round(now - self._start, 3),
            round(cpu_now - self._cpu_start, 3),
            [round(float(value), 6) for value in returns],  # type: ignore[union-attr]  # a list with return_episode_rewards
            [int(length) for length in lengths],  # type: ignore[union-attr]  # likewise
            self.num_timesteps,
        )
        for column, value in zip(self.curve.values(), values, strict=True):
            column.append(value)
        self._start += time.perf_counter() - now
        self._cpu_start += time.process_time() - cpu_now


def train(run: Run) -> dict[str, Any]:
    """Train and evaluate.

    :param run: the run
    :return: its results, ready for JSON
    """
    for package in run.gym_packages:
        importlib.import_module(package)
    if run.device == "cpu":
        # A repeated run must give the same file, so kernels must not be chosen by timing
        th.use_deterministic_algorithms(True, warn_only=True)
        th.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # set dynamically by torch
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        manager, file_settings, settings = load_settings(run, folder)
        env = manager.create_envs(manager.n_envs, no_log=True)
        settings = manager._preprocess_action_noise(settings, file_settings, env)
        eval_env = manager.create_envs(1, eval_env=True, no_log=True)
        eval_env.seed(_EVALUATION_SEED + run.seed)
        name, _ = split_algo(run.algo)
        model = import_zoo().ALGOS[name](env=env, seed=run.seed, verbose=0, device=run.device, **settings)
        steps = evaluation_steps(run.n_timesteps, run.n_evaluations)
        evaluation = EvaluationCallback(eval_env, steps, run.eval_episodes, manager.deterministic_eval)
        model.learn(run.n_timesteps, callback=[*manager.callbacks, evaluation])
        env.close()
        eval_env.close()
    return {
        "settings": {
            **run.common_settings(),
            "deterministic_evaluation": manager.deterministic_eval,
            "hyperparameters": json_hyperparameters(file_settings),
        },
        "reward_threshold": gym.spec(run.env).reward_threshold,  # the return at which the environment counts as solved
        "engine": getattr(getattr(model, "_engine", None), "title", None),
        "curve": evaluation.curve,
        "steps_taken": model.num_timesteps,  # algorithms may complete the last rollout
        "training_seconds": evaluation.training_seconds,
        "steps_per_second": round(model.num_timesteps / evaluation.training_seconds, 1),
        "peak_memory_bytes": peak_memory(),
    }


def describe(run: Run) -> dict[str, Any]:
    """Return the identity and the provenance of a run, ready for JSON.

    :param run: the run
    """
    return {
        "format": FILE_FORMAT,
        "algo": run.algo,
        "env": run.env,
        "seed": run.seed,
        **provenance(run.device),
    }


def main() -> None:
    """Read a run from stdin, train, and write its results as JSON to an open file.

    The command line has two numbers: the id of the parent process, and the descriptor of the file.
    """
    parent, result_fd = map(int, sys.argv[1:])
    exit_with_parent(parent)
    os.set_inheritable(result_fd, False)
    fields = json.loads(sys.stdin.read())
    run = Run(**{**fields, "gym_packages": tuple(fields["gym_packages"])})
    th.set_num_threads(1)
    start = time.perf_counter()
    content = describe(run)
    try:
        content.update(status="done", **train(run))
    except Exception as error:
        content.update(status="failed", settings=run.common_settings(), error=_describe_error(error))
    content["wall_seconds"] = round(time.perf_counter() - start, 1)
    with open(result_fd, "w") as file:
        json.dump(content, file)


def _describe_error(error: BaseException) -> dict[str, str]:
    return {
        "type": type(error).__name__,
        "message": str(error),
        "traceback": "".join(traceback.format_exception(error)),
    }


if __name__ == "__main__":
    main()
