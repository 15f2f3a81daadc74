"""``ScratchDQN``: its settings, how it acts, steps environments, trains, is saved, and converts from and to SB3's DQN.

The class is a chain of classes, each of which adds one job:

- ``base.DQNBase``: the attributes; ``state`` groups them, ``settings`` checks them
- ``persistence.PersistentAlgorithm``: files, pickles, environments; ``parameters`` checks what it loads,
  ``replay_setup`` builds the replay buffer, ``stacking`` detects stacked frames
- ``acting.EpsilonGreedyAlgorithm``: actions; ``exploration`` has epsilon and its schedules
- ``rollout.RolloutAlgorithm``: steps of the environments; ``finite`` checks them for NaN, ``subprocesses`` detects
  environment processes that have ended
- ``gradient_steps.GradientStepAlgorithm``: gradient steps, by an engine
- ``learning.LearningAlgorithm``: ``learn()``, and ``learn_offline()`` with ``offline``; ``target_sync`` decides when
  the target network is updated
- ``dqn.ScratchDQN``: the constructor; ``conversion`` from and to SB3's DQN
"""

from sb3_scratch_dqn.algorithm.dqn import ScratchDQN

__all__ = ["ScratchDQN"]
