"""Names of parameters of modules that lie inside wrappers.

``torch.compile(module)`` and ``torch.nn.DataParallel(module)`` return a module that holds the other one, and the names
of all parameters get its name in front. A saved model must not depend on that: it is loaded without the wrapper.
"""

from typing import TypeVar

from torch import nn

# Names by which wrappers hold the module: of what torch.compile returns, and of those for several devices
_COMPILED, _PARALLEL = "_orig_mod", "module"
_PARALLEL_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)

Value = TypeVar("Value")


def _plain_name_of_each(module: nn.Module) -> dict[str, str]:
    """Names in a ``state_dict``, and what they would be without wrappers."""
    plain = {name: name for name in module.state_dict()}
    wrapped = []
    for name, part in module.named_modules(remove_duplicate=False):
        held = _COMPILED if _COMPILED in part._modules else _PARALLEL if isinstance(part, _PARALLEL_WRAPPERS) else None
        if held is not None:
            wrapped.append((name, held))
    for name, held in reversed(wrapped):  # from the inside, so that the names of outer wrappers still fit
        outside = f"{name}." if name else ""
        inside = f"{outside}{held}."
        plain = {
            key: outside + value.removeprefix(inside) if value.startswith(inside) else value
            for key, value in plain.items()
        }
    return plain


def plain_names(state: dict[str, Value], module: nn.Module) -> dict[str, Value]:
    """Name the entries of a ``state_dict`` of a module as they were named without wrappers.

    :param state: by the names that the module has for them
    :param module: which may lie, or have parts that lie, inside wrappers
    """
    plain = _plain_name_of_each(module)
    return {plain.get(name, name): value for name, value in state.items()}


def wrapped_names(state: dict[str, Value], module: nn.Module) -> dict[str, Value]:
    """Undo :func:`plain_names`.

    :param state: by the names that there are without wrappers
    :param module: which is to load it
    """
    wrapped = {plain: name for name, plain in _plain_name_of_each(module).items()}
    return {wrapped.get(name, name): value for name, value in state.items()}
