"""Which policies the fused CPU engine can serve."""

from collections.abc import Iterator

import torch as th
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor
from torch import nn

from sb3_scratch_dqn.common.overriding import replaced
from sb3_scratch_dqn.engines.fused.dense import ACTIVATIONS, linear_layers
from sb3_scratch_dqn.engines.fused.flat import fused_adam_unsupported_reason
from sb3_scratch_dqn.engines.watch import has_hooks, hooks_reason, is_patched, torch_mode_reason, unknown_type_reason
from sb3_scratch_dqn.networks.noisy import NoisyLinear
from sb3_scratch_dqn.networks.policies import DQNPolicy
from sb3_scratch_dqn.networks.q_network import DuelingStreams, QNetwork


def dense_unsupported_reason(policy: DQNPolicy) -> str | None:
    """Why gradients of a policy cannot be written by hand; ``None`` if they can.

    :param policy: the policy, with its networks and its optimiser
    """
    reason = unknown_type_reason(policy) or torch_mode_reason("cpu")
    if reason is not None:
        return reason
    network = policy.q_net
    if policy.device.type != "cpu":
        return f"device={policy.device.type!r} is not 'cpu'"
    for one in (network, policy.q_net_target):
        if type(one) is not QNetwork:
            return f"the network is a {type(one).__name__}, not a plain QNetwork"
        if is_patched(one) or any("forward" in vars(module) for module in one.modules()):
            return "a method of the network was patched"
        if type(one.q_net) is not nn.Sequential or len(one.q_net) == 0:
            return f"the layers are a {type(one.q_net).__name__}, not a plain Sequential"
    if is_patched(policy.head) or replaced(policy, DQNPolicy, "noise"):
        return "a method of the head or the policy was replaced"
    if not _only_flattens(network.features_extractor):
        return f"features_extractor_class={type(network.features_extractor).__name__} does more than flatten"
    return (
        _why_no_layers(list(network.q_net))
        or _why_no_layers(list(policy.q_net_target.q_net))
        or _why_no_parameters(network)
        or _why_no_parameters(policy.q_net_target)
        or _why_not_trained(network, policy.q_net_target)
        or hooks_reason(network)
        or hooks_reason(policy.q_net_target)
        or fused_adam_unsupported_reason(policy.optimizer, network.parameters())
    )


def _only_flattens(extractor: nn.Module) -> bool:
    """Whether all that becomes of observations is that they lie side by side."""
    if type(extractor) is CombinedExtractor:
        return all(type(one) is nn.Flatten for one in extractor.extractors.values())
    return type(extractor) is FlattenExtractor


def _why_no_layers(modules: list[nn.Module]) -> str | None:
    if type(modules[-1]) is DuelingStreams:
        for stream in (modules[-1].value, modules[-1].advantage):
            if type(stream) is not nn.Sequential:
                return f"the layers of a stream are a {type(stream).__name__}, not a plain Sequential"
            reason = _why_no_layers(list(stream))
            if reason is not None:
                return reason
        modules = modules[:-1]
    known = {nn.Linear, NoisyLinear, *ACTIVATIONS}
    for module in modules:
        if type(module) not in known:
            names = ", ".join(activation.__name__ for activation in ACTIVATIONS)
            return f"activation_fn={type(module).__name__} is none of {names}"
    n_activations = sum(activation is not None for _, activation in linear_layers(modules))
    if n_activations != sum(type(module) in ACTIVATIONS for module in modules):
        return "the network has activations that do not follow a linear layer"
    return None


def _linear(modules: list[nn.Module]) -> Iterator[nn.Module]:
    """The linear layers, as often as they are used."""
    for module in modules:
        if isinstance(module, nn.Linear | NoisyLinear):
            yield module
        elif isinstance(module, DuelingStreams):
            yield from _linear([*module.value, *module.advantage])


def _why_no_parameters(network: QNetwork) -> str | None:
    used = [parameter for layer in _linear(list(network.q_net)) for parameter in layer._parameters.values()]
    if any(one is None for one in used):
        return "a layer has no bias"
    # named_parameters() leaves out what comes twice
    if list(map(id, used)) != [id(parameter) for parameter in network.parameters()]:
        return "layers share parameters, or the network has others than those of its layers"
    for name, parameter in network.named_parameters():
        if parameter.dtype != th.float32:
            return f"the parameter {name} has dtype {parameter.dtype}, not torch.float32"
        if has_hooks(parameter):
            return f"the parameter {name} has hooks"
        if parameter.untyped_storage().is_shared():
            return f"the parameter {name} lies in memory that processes share"
    return None


def _why_not_trained(network: QNetwork, target: QNetwork) -> str | None:
    """Why the online network cannot be trained apart from the target network, all of it."""
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            return f"the parameter {name} is frozen"
    followed = {parameter.data_ptr() for parameter in target.parameters() if parameter.numel()}
    if any(parameter.data_ptr() in followed for parameter in network.parameters()):
        return "the target network shares parameters with the online network"
    return None
