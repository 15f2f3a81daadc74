"""A naive replay buffer, the oracle of the tests."""

import copy

import numpy as np

from sb3_scratch_dqn.replay.observations import map_observation


class ListReplay:
    """Stores every step of every environment as it was added, and computes n-step returns in a loop."""

    def __init__(self, capacity):
        self.capacity = capacity
        self.rows = {}  # row of the ring buffer -> arguments of add()
        self.pos = 0

    def add(self, *step):
        self.rows[self.pos] = copy.deepcopy(step)
        self.newest = self.pos
        self.pos = (self.pos + 1) % self.capacity

    def transition(self, row, env, n_steps, gamma, shared_observations=False):
        total, discount = 0.0, 1.0
        for k in range(n_steps):
            at = (row + k) % self.capacity
            _, next_obs, _, reward, done, infos = self.rows[at]
            total += discount * float(reward[env])
            discount *= gamma
            truncated = infos[env].get("TimeLimit.truncated", False)
            if done[env] or truncated or at == self.newest or k == n_steps - 1:
                if shared_observations and at != self.newest:
                    next_obs = self.rows[(at + 1) % self.capacity][0]
                terminated = bool(done[env]) and not truncated
                obs, _, action = self.rows[row][:3]

                def of(observation):
                    return map_observation(lambda array: np.asarray(array[env]), observation)

                return of(obs), int(action[env]), total, 0.0 if terminated else discount, of(next_obs)
        raise AssertionError("unreachable")
