"""The interface of a :class:`QNetwork` for other modules that compute action values."""

from contextlib import AbstractContextManager

from jaxtyping import Float, Int64
from torch import Tensor, nn

from sb3_scratch_dqn.networks.noisy import NoisyLinear, noise
from sb3_scratch_dqn.networks.q_network import QNetwork, full_precision, q_values_in_eval_mode
from sb3_scratch_dqn.replay.batch import BatchedObs
from sb3_scratch_dqn.values.heads import ExpectedHead, ValueHead


class ForwardNetwork:
    """Adapter from a module, of which only ``forward`` is used, to the interface of a :class:`QNetwork`.

    Wrappers such as ``torch.nn.DataParallel`` forward no other method.

    :param module: observations -> action values, ``(B, A)``
    :param head: interprets the outputs, which must be the action values
    :raises ValueError: for a head that needs other outputs
    """

    def __init__(self, module: nn.Module, head: ValueHead) -> None:
        if not isinstance(head, ExpectedHead):
            raise ValueError(
                f"the network is a {type(module).__name__} without a method outputs(), which {type(head).__name__} "
                "needs: derive it from sb3_scratch_dqn.networks.q_network.QNetwork, or use head='expected'"
            )
        self._module = module

    @property
    def training(self) -> bool:
        """Whether the module is in training mode."""
        return self._module.training

    def set_training_mode(self, mode: bool) -> None:
        """Switch batch normalisation and dropout to training or evaluation."""
        self._module.train(mode)

    def __call__(self, obs: BatchedObs) -> Float[Tensor, "B A"]:
        """Return action values."""
        values: Tensor = self._module(obs)
        return values

    def outputs(self, obs: BatchedObs) -> Float[Tensor, "B A 1"]:
        """Return the outputs that the head interprets."""
        return full_precision(self(obs)).unsqueeze(2)

    def target_outputs(self, obs: BatchedObs) -> Float[Tensor, "B A 1"]:
        """Return the outputs from which targets are computed."""
        return self.outputs(obs)

    def q_values_from(self, obs: BatchedObs, target_outputs: Float[Tensor, "B A 1"]) -> Float[Tensor, "B A"]:
        """Return the action values of observations whose :meth:`target_outputs` are known."""
        return target_outputs.squeeze(2)

    def eval_q_values(self, obs: BatchedObs) -> Float[Tensor, "B A"]:
        """Return action values, computed in evaluation mode."""
        return q_values_in_eval_mode(self, obs)

    @property
    def noisy_layers(self) -> list[NoisyLinear]:
        """All noisy layers of the module."""
        return [module for module in self._module.modules() if isinstance(module, NoisyLinear)]

    def noise(self) -> AbstractContextManager[None]:
        """Return a context in which the noisy layers have fresh noise."""
        return noise(self.noisy_layers)

    def _predict(self, observation: BatchedObs, deterministic: bool = True) -> Int64[Tensor, "B"]:
        return self(observation).argmax(dim=1).reshape(-1)


def as_q_network(module: QNetwork, head: ValueHead) -> QNetwork | ForwardNetwork:
    """Return a module with the interface of a :class:`QNetwork`.

    :param module: a :class:`QNetwork`, a proxy of one, or another module that computes action values
    :param head: interprets its outputs
    """
    if isinstance(module, QNetwork) or hasattr(module, "outputs"):
        return module
    return ForwardNetwork(module, head)
