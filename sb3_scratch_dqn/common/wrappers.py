"""Parameter names of wrapped modules.

``torch.compile(module)`` and ``torch.nn.DataParallel(module)`` return a module that contains the original one and
prefixes all of its parameter names. A saved model must not contain these prefixes, since it is loaded without the
wrapper.
"""

from typing import TypeVar

from torch import nn

# Attribute that holds the original module: in the result of torch.compile, and in wrappers for several devices
_COMPILED, _PARALLEL = "_orig_mod", "module"
_PARALLEL_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)

Value = TypeVar("Value")


def _unwrapped_names(module: nn.Module) -> dict[str, str]:
    """Map each name in ``module.state_dict()`` to the name that it has without wrappers."""
    unwrapped = {name: name for name in module.state_dict()}
    wrappers = []
    for name, part in module.named_modules(remove_duplicate=False):
        attribute = (
            _COMPILED if _COMPILED in part._modules else _PARALLEL if isinstance(part, _PARALLEL_WRAPPERS) else None
        )
        if attribute is not None:
            wrappers.append((name, attribute))
    for name, attribute in reversed(wrappers):  # innermost first, so that the prefixes of outer wrappers still match
        outer = f"{name}." if name else ""
        inner = f"{outer}{attribute}."
        unwrapped = {
            key: outer + value.removeprefix(inner) if value.startswith(inner) else value
            for key, value in unwrapped.items()
        }
    return unwrapped


def strip_wrapper_prefixes(state: dict[str, Value], module: nn.Module) -> dict[str, Value]:
    """Rename the entries of a ``state_dict`` to the names that they have without wrappers.

    :param state: keyed by the parameter names of ``module``
    :param module: may be a wrapper or contain some
    """
    unwrapped = _unwrapped_names(module)
    return {unwrapped.get(name, name): value for name, value in state.items()}


def add_wrapper_prefixes(state: dict[str, Value], module: nn.Module) -> dict[str, Value]:
    """Undo :func:`strip_wrapper_prefixes`.

    :param state: keyed by the names without wrappers
    :param module: the module that will load the state
    """
    wrapped = {unwrapped: name for name, unwrapped in _unwrapped_names(module).items()}
    return {wrapped.get(name, name): value for name, value in state.items()}
