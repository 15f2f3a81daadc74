"""What an engine leaves behind of its last update, for people to look at."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch as th

from sb3_scratch_dqn.values.heads import ValueHead


class LastUpdate(NamedTuple):
    """The pieces of the last gradient step. Nothing is computed of them until somebody wants to see it.

    :param head: says what the outputs mean
    :param outputs: what the online network said of the actions taken, ``(B, K)``
    :param target: what it should have said, as the head has it
    :param grad_norm: of the gradient before it was scaled down, one number
    """

    head: ValueHead
    outputs: th.Tensor | npt.NDArray[np.float32]
    target: th.Tensor | npt.NDArray[np.float32]
    grad_norm: th.Tensor | float

    def metrics(self) -> dict[str, float]:
        """Means over the batch, by the names that they are logged under."""
        outputs, target = th.as_tensor(self.outputs), th.as_tensor(self.target)
        means, target_means, spread = self.head.moments(outputs, target)
        metrics = {
            "train/q_mean": means.mean().item(),
            "train/target_mean": target_means.mean().item(),
            "train/td_error": (target_means - means).abs().mean().item(),
            "train/grad_norm": float(self.grad_norm),
        }
        if spread is not None:
            metrics["train/q_std"] = spread.mean().item()
        return metrics
