"""An environment process that has ended is named, with its exit status."""

import os
import signal

import pytest
from helpers import TimeoutEnv
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecMonitor

from sb3_scratch_dqn import ScratchDQN

# Fast, for environments without threads
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork\\(\\) may lead to deadlocks:DeprecationWarning")

SETTINGS = {"learning_starts": 10, "batch_size": 8, "buffer_size": 200, "seed": 0}


class Ending(TimeoutEnv):
    """Ends its process in one way or the other, at a step or when it is reset."""

    def __init__(self, how, when):
        self.how, self.when, self.steps = how, when, 0

    def _end(self, now):
        if now == self.when:
            if self.how == "raise":
                raise RuntimeError("the environment is broken")
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            os._exit(7)

    def step(self, action):
        self.steps += 1
        self._end(self.steps)
        return super().step(action)

    def reset(self, **kwargs):
        self._end("reset")
        return super().reset(**kwargs)


ENDS = [
    ("exit", 5, "exit status 7;"),
    ("kill", 5, r"signal 9 \(SIGKILL\);"),
    ("raise", 5, "exit status 1;"),
    ("exit", "reset", "exit status 7;"),
]


@pytest.mark.parametrize("wrap", [lambda env: env, VecMonitor], ids=["plain", "wrapped"])
@pytest.mark.parametrize(("how", "when", "message"), ENDS)
def test_the_environment_and_its_exit_status_are_named(how, when, message, wrap):
    envs = SubprocVecEnv([TimeoutEnv, lambda: Ending(how, when)], start_method="fork")
    model = ScratchDQN("MlpPolicy", wrap(envs), **SETTINGS)
    with pytest.raises(ChildProcessError, match=f"the process of environment 1 ended with {message}") as caught:
        model.learn(100)
    assert isinstance(caught.value.__cause__, EOFError | ConnectionError | BrokenPipeError)
    for process in envs.processes:
        process.kill()


@pytest.mark.parametrize("start_method", ["fork", "forkserver"])
def test_processes_that_were_forked_are_warned_of(start_method):
    envs = SubprocVecEnv([lambda: Ending("exit", 3)], start_method=start_method)
    model = ScratchDQN("MlpPolicy", envs, **SETTINGS)
    with pytest.raises(ChildProcessError, match="environment 0 ended with exit status 7;") as caught:
        model.learn(100)
    message = "start_method='fork' copies locks held by threads of PyTorch"
    assert (message in str(caught.value)) == (start_method == "fork")


def test_other_ends_of_files_stay_what_they_are():
    class Ends(BaseCallback):
        def _on_step(self):
            raise EOFError("of a file of the user's")

    for envs in (DummyVecEnv([TimeoutEnv]), SubprocVecEnv([TimeoutEnv], start_method="fork")):
        with pytest.raises(EOFError, match="of a file of the user's"):
            ScratchDQN("MlpPolicy", envs, **SETTINGS).learn(50, Ends())
        envs.close()
