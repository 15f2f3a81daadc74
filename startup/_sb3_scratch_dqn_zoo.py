"""Register ``scratch_dqn`` in RL Zoo when a program imports the Zoo.

This module runs at every start of the interpreter. It therefore imports only modules that the interpreter has already
loaded, and catches every error: at worst, it prints one line to stderr and the Zoo does not have ``scratch_dqn``.
"""

import os
import sys

# The modules in which the package registers, each right after it is loaded
ZOO_MODULES = frozenset({"rl_zoo3.utils", "rl_zoo3.hyperparams_opt", "rl_zoo3.exp_manager"})


class ZooFinder:
    """A meta path finder that delegates to the other finders and makes the Zoo's modules register after loading."""

    def find_spec(self, name, path=None, target=None):
        """Return the spec that the other finders find for one of ``ZOO_MODULES``, and ``None`` for other modules."""
        if name not in ZOO_MODULES:
            return None
        for finder in sys.meta_path:
            find_spec = getattr(finder, "find_spec", None)
            if finder is self or find_spec is None:
                continue
            spec = find_spec(name, path, target)
            if spec is not None:
                _register_after_loading(spec.loader)
                return spec
        return None


def _register_after_loading(loader):
    try:
        original = loader.exec_module

        def exec_module(module):
            original(module)
            _register(module)

        loader.exec_module = exec_module  # this loader instance loads only this module
    except AttributeError as error:
        _print_error(error)


def _register(module):
    try:
        from sb3_scratch_dqn import zoo

        zoo.register_in(module)
    except Exception as error:
        _print_error(error)


def _print_error(error):
    message = f"sb3_scratch_dqn: could not register scratch_dqn in RL Zoo: {type(error).__name__}: {error}"
    print(" ".join(message.split()), file=sys.stderr)


def install():
    """Install the finder, unless ``SB3_SCRATCH_DQN_NO_ZOO`` is set."""
    if os.environ.get("SB3_SCRATCH_DQN_NO_ZOO", "0") not in ("", "0"):
        return
    if not any(type(finder).__name__ == "ZooFinder" for finder in sys.meta_path):
        sys.meta_path.insert(0, ZooFinder())
