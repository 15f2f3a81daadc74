"""Shared utilities: checks of arguments, file access, available memory, SIGINT handling, overrides and wrappers.

Import them from their modules, e.g. ``from sb3_scratch_dqn.common.checks import check_count``.
"""

__all__ = [
    "check_spaces",
    "check_training",
    "checks",
    "files",
    "interrupts",
    "memory",
    "overrides",
    "wrappers",
]
