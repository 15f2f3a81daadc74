r"""Networks of linear layers without autograd.

A layer with inputs :math:`X` ``(B, K)``, weights :math:`W` ``(N, K)`` and bias :math:`b` computes

.. math:: Z = X W^\top + b, \qquad H = f(Z),

where :math:`f` is the identity, ReLU or tanh. From the gradient :math:`\bar H` of the loss with respect to :math:`H`
follow

.. math:: \bar Z = \bar H \odot f'(Z), \qquad \bar W = \bar Z^\top X, \qquad \bar b = \bar Z^\top 1,
          \qquad \bar X = \bar Z W,

with :math:`f'(Z) = [H > 0]` for ReLU and :math:`1 - H^2` for tanh.

Noisy layers (:mod:`sb3_scratch_dqn.noisy`) use :math:`W + \Sigma \odot \varepsilon \eta^\top` in the place of
:math:`W` and :math:`b + \sigma \odot \varepsilon` in that of :math:`b`. Then
:math:`\bar \Sigma = \bar W \odot \varepsilon \eta^\top` and :math:`\bar \sigma = \bar b \odot \varepsilon`.

Dueling streams compute :math:`Q_a = V + A_a - \frac{1}{|A|} \sum_{a'} A_{a'}`, so :math:`\bar V = \sum_a \bar Q_a` and
:math:`\bar A_a = \bar Q_a - \frac{1}{|A|} \sum_{a'} \bar Q_{a'}`.

Everything lies in memory that is allocated once: one set for each number of rows ``B``, which a *pass* holds.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch as th
from torch import nn

from sb3_scratch_dqn.engines.products import Both, Floats, both, both_of_array, empty, products_for
from sb3_scratch_dqn.networks import DuelingStreams
from sb3_scratch_dqn.noisy import NoisyLinear

ACTIVATIONS: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.Tanh: "tanh"}

_ZERO = np.float32(0)
_ONE = np.float32(1)

# Up to so many rows it is cheaper to bring noise to the inputs and outputs of a layer than to its weights
_FEW_ROWS = 16


def _relu(h: Floats) -> None:
    np.maximum(h, _ZERO, out=h)


def _relu_gradient(h: Floats, g: Floats, scratch: Floats) -> None:
    np.sign(h, out=scratch)
    np.multiply(g, scratch, out=g)


def _tanh(h: Floats) -> None:
    np.tanh(h, out=h)


def _tanh_gradient(h: Floats, g: Floats, scratch: Floats) -> None:
    np.multiply(h, h, out=scratch)
    np.subtract(_ONE, scratch, out=scratch)
    np.multiply(g, scratch, out=g)


# In place, on outputs
Activate = Callable[[Floats], None]

# Outputs, gradients, which it changes in place, and memory for something of their size
BackThrough = Callable[[Floats, Floats, Floats], None]

_FUNCTIONS: dict[str, tuple[Activate, BackThrough]] = {
    "relu": (_relu, _relu_gradient),
    "tanh": (_tanh, _tanh_gradient),
}


class Noise:
    """What a noisy layer has besides weights and bias.

    :param layer: the layer, whose parameters are read
    :param gradients: memory for the gradients of ``weight_sigma`` and ``bias_sigma``
    """

    def __init__(self, layer: NoisyLinear, gradients: tuple[Both, Both] | None) -> None:
        self.weight_sigma, self.bias_sigma = both(layer.weight_sigma.detach()), both(layer.bias_sigma.detach())
        self.gradients = gradients
        self.inputs: Floats
        self.outputs: Floats
        self.in_weights = False  # whether weight and bias have the noise of now
        self.weight, self.bias = empty(layer.out_features, layer.in_features), empty(layer.out_features)

    def draw(self) -> None:
        """Draw other noise, the numbers that :meth:`NoisyLinear.draw_noise` draws."""
        n_outputs, n_inputs = self.weight.array.shape
        scaled = th.randn(n_outputs + n_inputs).numpy()
        scaled = np.sign(scaled) * np.sqrt(np.abs(scaled))
        self.outputs, self.inputs = scaled[:n_outputs], scaled[n_outputs:]
        self.in_weights = False

    def bring_to(self, weight: Both, bias: Both) -> None:
        """Compute weights and bias with the noise of now."""
        outputs, inputs = th.from_numpy(self.outputs), th.from_numpy(self.inputs)
        th.outer(outputs, inputs, out=self.weight.tensor)
        th.addcmul(weight.tensor, self.weight_sigma.tensor, self.weight.tensor, out=self.weight.tensor)
        np.multiply(self.bias_sigma.array, self.outputs, out=self.bias.array)
        np.add(self.bias.array, bias.array, out=self.bias.array)
        self.in_weights = True

    def back(self, weight_gradient: Both, bias_gradient: Both) -> None:
        """Gradients of the sigmas from those of weights and bias."""
        assert self.gradients is not None
        weight_sigma, bias_sigma = self.gradients
        np.multiply(weight_gradient.array, self.outputs[:, None], out=weight_sigma.array)
        np.multiply(weight_sigma.array, self.inputs, out=weight_sigma.array)
        np.multiply(bias_gradient.array, self.outputs, out=bias_sigma.array)


class Layer:
    """A linear layer and the activation behind it.

    :param layer: its parameters are read where they lie
    :param activation: ``"relu"``, ``"tanh"``, or ``None``
    :param trains: whether there will be gradients, for which the parameters have ``grad``
    """

    def __init__(self, layer: nn.Linear | NoisyLinear, activation: str | None, trains: bool) -> None:
        def gradient(parameter: th.Tensor) -> Both:
            assert parameter.grad is not None
            return both(parameter.grad)

        self.weight, self.bias = both(layer.weight.detach()), both(layer.bias.detach())
        self.activation = activation
        self.gradients = (gradient(layer.weight), gradient(layer.bias)) if trains else None
        self.noise: Noise | None = None
        if isinstance(layer, NoisyLinear):
            own = (gradient(layer.weight_sigma), gradient(layer.bias_sigma)) if trains else None
            self.noise = Noise(layer, own)
        self.with_noise = False
        self.n_outputs, self.n_inputs = self.weight.array.shape


class LayerPass:
    """One layer on so many rows.

    :param layer: the layer
    :param rows: ``B``
    """

    def __init__(self, layer: Layer, rows: int) -> None:
        self.layer = layer
        self.products = products_for(rows, layer.n_inputs, layer.n_outputs)
        self.out = empty(rows, layer.n_outputs)
        self._activate: Activate | None = None
        self._back_through: BackThrough | None = None
        if layer.activation is not None:
            self._activate, self._back_through = _FUNCTIONS[layer.activation]
        self._rows = rows
        self._used = layer.weight
        self._inputs: Both = self.out  # until there were some
        self._scratch: Floats | None = None
        self._ones: Floats | None = None
        self._input_gradient: Both | None = None

    def forward(self, x: Both) -> Both:
        """``(B, K)`` to ``(B, N)``."""
        layer, out = self.layer, self.out
        weight, bias = layer.weight, layer.bias
        if layer.with_noise:
            noise = layer.noise
            assert noise is not None
            if not noise.in_weights:
                return self._forward_with_noise(x, noise)
            weight, bias = noise.weight, noise.bias
        self._inputs, self._used = x, weight
        self.products.outputs(x, weight, out)
        np.add(out.array, bias.array, out=out.array)
        if self._activate is not None:
            self._activate(out.array)
        return out

    def _forward_with_noise(self, x: Both, noise: Noise) -> Both:
        out = self.out.array
        np.dot(x.array, self.layer.weight.array.T, out=out)
        out += self.layer.bias.array
        out += noise.outputs * (np.dot(x.array * noise.inputs, noise.weight_sigma.array.T) + noise.bias_sigma.array)
        if self._activate is not None:
            self._activate(out)
        return self.out

    def backward(self, g: Both, to_inputs: bool) -> Both | None:
        """Write the gradients of the parameters.

        :param g: the gradient of the outputs, ``(B, N)``, which is overwritten
        :param to_inputs: whether to compute that of the inputs too
        :return: that, ``(B, K)``
        """
        layer = self.layer
        assert layer.gradients is not None
        if self._ones is None:
            self._ones = np.ones(self._rows, dtype=np.float32)
        if self._back_through is not None:
            if self._scratch is None:
                self._scratch = np.empty_like(self.out.array)
            self._back_through(self.out.array, g.array, self._scratch)
        weight_gradient, bias_gradient = layer.gradients
        self.products.weight_gradient(g, self._inputs, weight_gradient)
        np.dot(self._ones, g.array, out=bias_gradient.array)
        if layer.with_noise:
            assert layer.noise is not None
            layer.noise.back(weight_gradient, bias_gradient)
        if not to_inputs:
            return None
        if self._input_gradient is None:
            self._input_gradient = empty(self._rows, layer.n_inputs)
        self.products.input_gradient(g, self._used, self._input_gradient)
        return self._input_gradient


class _Chain:
    """Layers one behind the other."""

    def __init__(self, layers: Sequence[Layer], rows: int) -> None:
        self.passes = [LayerPass(layer, rows) for layer in layers]

    def forward(self, x: Both) -> Both:
        for one in self.passes:
            x = one.forward(x)
        return x

    def backward(self, g: Both, to_inputs: bool) -> Both | None:
        inputs: Both | None = g
        for number in range(len(self.passes) - 1, -1, -1):
            assert inputs is not None
            inputs = self.passes[number].backward(inputs, to_inputs or number > 0)
        return inputs


class DenseNetwork:
    """The layers of a network, in the order in which noise is drawn for them.

    :param modules: linear layers, activations, and at the end perhaps dueling streams
    :param trains: whether there will be gradients
    """

    def __init__(self, modules: Sequence[nn.Module], trains: bool) -> None:
        self.streams: tuple[list[Layer], list[Layer]] | None = None
        if isinstance(modules[-1], DuelingStreams):
            streams = modules[-1]
            self.shape: tuple[int, int] = streams.shape
            self.trunk = _layers(modules[:-1], trains)
            self.streams = (_layers(list(streams.value), trains), _layers(list(streams.advantage), trains))
        else:
            self.trunk = _layers(modules, trains)
        layers = [*self.trunk, *(self.streams[0] if self.streams else []), *(self.streams[1] if self.streams else [])]
        self.noisy = [layer for layer in layers if layer.noise is not None]
        self.n_outputs = int(np.prod(self.shape)) if self.streams else layers[-1].n_outputs
        self._passes: dict[int, NetworkPass] = {}

    def passing(self, rows: int) -> "NetworkPass":
        """A pass for so many rows."""
        if rows not in self._passes:
            while len(self._passes) >= _PASSES_KEPT:
                del self._passes[next(iter(self._passes))]
            self._passes[rows] = NetworkPass(self, rows)
        return self._passes[rows]

    def draw_noise(self, in_weights: bool = True) -> None:
        """Have other noise from now on.

        :param in_weights: bring it to the weights, as training needs it; if not, it is brought to inputs and outputs
        """
        for layer in self.noisy:
            assert layer.noise is not None
            layer.noise.draw()
            if in_weights:
                layer.noise.bring_to(layer.weight, layer.bias)
            layer.with_noise = True

    def clear_noise(self) -> None:
        """Have no noise from now on."""
        for layer in self.noisy:
            layer.with_noise = False


# Numbers of rows of which memory is kept
_PASSES_KEPT = 16


class NetworkPass:
    """A network on so many rows.

    :param network: the network
    :param rows: ``B``
    """

    def __init__(self, network: DenseNetwork, rows: int) -> None:
        self.few_rows = rows <= _FEW_ROWS
        self._trunk = _Chain(network.trunk, rows)
        self._streams: tuple[_Chain, _Chain] | None = None
        if network.streams is not None:
            self._streams = (_Chain(network.streams[0], rows), _Chain(network.streams[1], rows))
            n_actions, n_outputs = network.shape
            self._out, self._advantage = empty(rows, n_actions * n_outputs), empty(rows, n_actions * n_outputs)
            self._value = empty(rows, n_outputs)
            self._view = (rows, n_actions, n_outputs)

    def forward(self, x: Both) -> Both:
        """``(B, n_inputs)`` to ``(B, A * K)``, in memory that the next call overwrites."""
        h = self._trunk.forward(x)
        if self._streams is None:
            return h
        value, advantage = (stream.forward(h).array for stream in self._streams)
        advantages = advantage.reshape(self._view)
        out = self._out.array.reshape(self._view)
        np.add(advantages, (value - advantages.mean(axis=1))[:, None], out=out)
        return self._out

    def backward(self, g: Both) -> None:
        """Write the gradients of all parameters, after :meth:`forward`.

        :param g: the gradient of the outputs, ``(B, A * K)``, which is overwritten
        """
        if self._streams is None:
            self._trunk.backward(g, to_inputs=False)
            return
        gradients = g.array.reshape(self._view)
        gradients.sum(axis=1, out=self._value.array)
        mean = self._value.array / np.float32(self._view[1])
        np.subtract(gradients, mean[:, None], out=self._advantage.array.reshape(self._view))
        to_inputs = bool(self._trunk.passes)
        value_stream, advantage_stream = self._streams
        of_value = value_stream.backward(self._value, to_inputs)
        of_advantage = advantage_stream.backward(self._advantage, to_inputs)
        if to_inputs:
            assert of_value is not None
            assert of_advantage is not None
            np.add(of_value.array, of_advantage.array, out=of_value.array)
            self._trunk.backward(of_value, to_inputs=False)


def linear_layers(modules: Sequence[nn.Module]) -> Iterator[tuple[nn.Module, type[nn.Module] | None]]:
    """Each layer and the class of the activation behind it.

    :param modules: in their order
    """
    for number, module in enumerate(modules):
        if isinstance(module, nn.Linear | NoisyLinear):
            following: Any = modules[number + 1] if number + 1 < len(modules) else None
            is_activation = following is not None and not isinstance(
                following, nn.Linear | NoisyLinear | DuelingStreams
            )
            yield module, type(following) if is_activation else None


def _layers(modules: Sequence[nn.Module], trains: bool) -> list[Layer]:
    layers = []
    for module, activation in linear_layers(modules):
        assert isinstance(module, nn.Linear | NoisyLinear)
        layers.append(Layer(module, None if activation is None else ACTIVATIONS[activation], trains))
    return layers


def as_inputs(array: Any) -> Both:
    """Observations as the first layer takes them: ``(B, ...)`` to ``(B, n_inputs)``, float32."""
    flat = array.reshape(len(array), -1)
    return both_of_array(np.ascontiguousarray(flat, dtype=np.float32))
