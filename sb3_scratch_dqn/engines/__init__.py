"""Engines: how one update is executed."""

from sb3_scratch_dqn.engines.choose import ENGINE_NAMES, Engine, choose_engine

__all__ = ["ENGINE_NAMES", "Engine", "choose_engine"]
