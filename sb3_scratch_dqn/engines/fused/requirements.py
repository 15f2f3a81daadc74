"""Which policies the fused CPU engine supports."""

from collections.abc import Iterator

import torch as th
from stable_baselines3.common.torch_layers import CombinedExtractor, FlattenExtractor
from torch import nn

from sb3_scratch_dqn.common.overrides import is_overridden
from sb3_scratch_dqn.engines.fused.dense import ACTIVATIONS, linear_layers
from sb3_scratch_dqn.engines.fused.flat import fused_adam_unsupported_reason
from sb3_scratch_dqn.engines.modifications import (
    has_hooks,
    hooks_reason,
    is_patched,
    torch_mode_reason,
    unknown_type_reason,
)
from sb3_scratch_dqn.networks.noisy import NoisyLinear
from sb3_scratch_dqn.networks.policies import DQNPolicy
from sb3_scratch_dqn.networks.q_network import DuelingStreams, QNetwork


def dense_unsupported_reason(policy: DQNPolicy) -> str | None:
    """Return why hand-derived gradients do not support a policy, or ``None`` if they do.

    :param policy: the policy, with its networks and its optimiser
    """
    reason = unknown_type_reason(policy) or torch_mode_reason("cpu")
    if reason is not None:
        return reason
    online, target = policy.q_net, policy.q_net_target
    if policy.device.type != "cpu":
        return f"device={policy.device.type!r} is not 'cpu'"
    for network in (online, target):
        if type(network) is not QNetwork:
            return f"the network is a {type(network).__name__}, not a plain QNetwork"
        if is_patched(network) or any("forward" in vars(module) for module in network.modules()):
            return "a method of the network was patched"
        if type(network.q_net) is not nn.Sequential or len(network.q_net) == 0:
            return f"the layers are a {type(network.q_net).__name__}, not a plain Sequential"
    if is_patched(policy.head) or is_overridden(policy, DQNPolicy, "noise"):
        return "a method of the head or the policy was overridden or patched"
    if not _only_flattens(online.features_extractor):
        return f"features_extractor_class={type(online.features_extractor).__name__} does more than flatten"
    return (
        _layers_reason(list(online.q_net))
        or _layers_reason(list(target.q_net))
        or _parameters_reason(online)
        or _parameters_reason(target)
        or _untrainable_reason(online, target)
        or hooks_reason(online)
        or hooks_reason(target)
        or fused_adam_unsupported_reason(policy.optimizer, online.parameters())
    )


def _only_flattens(extractor: nn.Module) -> bool:
    """Return True if the features are the observations, flattened and concatenated."""
    if type(extractor) is CombinedExtractor:
        return all(type(part) is nn.Flatten for part in extractor.extractors.values())
    return type(extractor) is FlattenExtractor


def _layers_reason(modules: list[nn.Module]) -> str | None:
    """Return which module is unsupported, or ``None`` if none is."""
    if type(modules[-1]) is DuelingStreams:
        for stream in (modules[-1].value, modules[-1].advantage):
            if type(stream) is not nn.Sequential:
                return f"the layers of a stream are a {type(stream).__name__}, not a plain Sequential"
            reason = _layers_reason(list(stream))
            if reason is not None:
                return reason
        modules = modules[:-1]
    supported = {nn.Linear, NoisyLinear, *ACTIVATIONS}
    for module in modules:
        if type(module) not in supported:
            names = ", ".join(activation.__name__ for activation in ACTIVATIONS)
            return f"activation_fn={type(module).__name__} is none of {names}"
    n_activations = sum(activation is not None for _, activation in linear_layers(modules))
    if n_activations != sum(type(module) in ACTIVATIONS for module in modules):
        return "the network has activations that do not follow a linear layer"
    return None


def _layer_uses(modules: list[nn.Module]) -> Iterator[nn.Module]:
    """Yield the linear layers in the order of the forward pass; a shared layer several times."""
    for module in modules:
        if isinstance(module, nn.Linear | NoisyLinear):
            yield module
        elif isinstance(module, DuelingStreams):
            yield from _layer_uses([*module.value, *module.advantage])


def _parameters_reason(network: QNetwork) -> str | None:
    """Return what is unsupported about the parameters of a network, or ``None`` if nothing is."""
    used = [parameter for layer in _layer_uses(list(network.q_net)) for parameter in layer._parameters.values()]
    if any(parameter is None for parameter in used):
        return "a layer has no bias"
    # parameters() yields a shared parameter once
    if list(map(id, used)) != [id(parameter) for parameter in network.parameters()]:
        return "layers share parameters, or the network has parameters outside of its layers"
    for name, parameter in network.named_parameters():
        if parameter.dtype != th.float32:
            return f"the parameter {name} has dtype {parameter.dtype}, not torch.float32"
        if has_hooks(parameter):
            return f"the parameter {name} has hooks"
        if parameter.untyped_storage().is_shared():
            return f"the parameter {name} is in memory shared between processes"
    return None


def _untrainable_reason(network: QNetwork, target: QNetwork) -> str | None:
    """Return why the online network cannot be trained completely and separately from the target network, or None."""
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            return f"the parameter {name} is frozen"
    target_pointers = {parameter.data_ptr() for parameter in target.parameters() if parameter.numel()}
    if any(parameter.data_ptr() in target_pointers for parameter in network.parameters()):
        return "the target network shares parameters with the online network"
    return None
