"""Check in the test run that tensors have the shapes and dtypes that annotations name.

Users pay nothing for these annotations: only ``tests/conftest.py`` installs the checks.
"""

from typing import Any, get_args

import torch as th
from beartype import beartype
from jaxtyping import AbstractArray, config, install_import_hook, jaxtyped

MODULES = ("sb3_scratch_dqn.values", "sb3_scratch_dqn.networks", "sb3_scratch_dqn.replay.batch")

# A check takes about 100 us, several tensor operations. In a training loop the shapes repeat, so it would double the
# time of a test to check them all
CHECKS_PER_TEST = 500

_n_checks = 0


def install():
    """Install the checks. Call before the package is imported."""
    with install_import_hook(MODULES, "shapes.check"):
        from sb3_scratch_dqn.replay.batch import ArrayBatch, Batch
        from sb3_scratch_dqn.values.heads import ImplicitQuantiles
        from sb3_scratch_dqn.values.td import TDLosses
    # jaxtyping's hook ignores the fields of NamedTuples
    for named_tuple in (ArrayBatch, Batch, ImplicitQuantiles, TDLosses):
        named_tuple.__new__ = jaxtyped(named_tuple.__new__, typechecker=check)


def start_test():
    """Enable the checks for the first function calls of a test."""
    global _n_checks
    _n_checks = 0
    config.update("jaxtyping_disable", False)


def check(function):
    """Check the annotations of a function that name shapes.

    Other annotations are ignored: for invalid arguments, functions raise a ValueError with their own message.
    """
    function.__annotations__ = {key: hint for key, hint in function.__annotations__.items() if _names_shape(hint)}
    if not function.__annotations__:
        return function
    checked = beartype(function)

    def counted(*args, **kwargs):
        global _n_checks
        if th.compiler.is_compiling():  # torch.compile cannot trace beartype
            return function(*args, **kwargs)
        _n_checks += 1
        if _n_checks >= CHECKS_PER_TEST:
            config.update("jaxtyping_disable", True)
        return checked(*args, **kwargs)

    return counted


def _names_shape(annotation: Any) -> bool:
    is_shape = isinstance(annotation, type) and issubclass(annotation, AbstractArray)
    return is_shape or any(map(_names_shape, get_args(annotation)))
