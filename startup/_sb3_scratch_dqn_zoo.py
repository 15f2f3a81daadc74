"""Waits for RL Zoo to be imported, then adds ``scratch_dqn`` to it.

It runs at every start of the interpreter, so it imports nothing that the interpreter has not loaded by then, and never
lets an error out: the worst that happens is one line on stderr and a Zoo without ``scratch_dqn``.
"""

import os
import sys

# What the package registers in; each is completed right after it was loaded
ZOO_MODULES = frozenset({"rl_zoo3.utils", "rl_zoo3.hyperparams_opt", "rl_zoo3.exp_manager"})


class ZooFinder:
    """Lets the other finders find the Zoo's modules, and has them registered in once they have run."""

    def find_spec(self, name, path=None, target=None):
        """Find a module as the other finders do; all but a few names are left to them at once."""
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
        load = loader.exec_module

        def exec_module(module):
            load(module)
            _register(module)

        loader.exec_module = exec_module  # on this one loader, which serves this one module
    except AttributeError as error:
        _complain(error)


def _register(module):
    try:
        from sb3_scratch_dqn import zoo

        zoo.register_in(module)
    except Exception as error:
        _complain(error)


def _complain(error):
    message = f"sb3_scratch_dqn: scratch_dqn is missing in RL Zoo: {type(error).__name__}: {error}"
    print(" ".join(message.split()), file=sys.stderr)


def install():
    """Begin to wait, unless the environment says not to."""
    if os.environ.get("SB3_SCRATCH_DQN_NO_ZOO", "0") not in ("", "0"):
        return
    if not any(type(finder).__name__ == "ZooFinder" for finder in sys.meta_path):
        sys.meta_path.insert(0, ZooFinder())
