"""Imports go one way through the package, and none reaches into SB3's DQN."""

import ast
from pathlib import Path

import sb3_scratch_dqn

ROOT = Path(sb3_scratch_dqn.__file__).parent

# What a part may import, beside itself
ALLOWED = {
    "heads": {"checks"},
    "noisy": set(),
    "masks": {"checks"},
    "target_sync": set(),
    "exploration": set(),
    "search_space": set(),
    "overriding": set(),
    "wrappers": set(),
    "interrupts": set(),
    "subprocesses": set(),
    "finite": {"replay"},
    "support": {"heads", "replay"},
    "replay": {"checks", "overriding"},
    "td": {"heads", "masks", "overriding", "replay"},
    "networks": {"heads", "noisy"},
    "policies": {"checks", "heads", "masks", "networks", "noisy"},
    "engines": {"heads", "networks", "noisy", "overriding", "policies", "replay", "td"},
    "checks": set(),
    "files": {"checks"},
    "prefill": {"checks", "replay"},
    "replay_files": {"checks", "files", "replay"},
    "checked_algorithm": {"checks", "files", "replay", "replay_files", "wrappers"},
    "acting": {
        "checked_algorithm", "checks", "exploration", "finite", "interrupts", "masks", "overriding", "policies",
        "replay", "support",
    },
    "rollout": {"acting", "overriding", "replay"},
    "settings": {"checks", "engines", "exploration", "heads", "masks", "policies", "replay", "td"},
    "conversion": {"checks", "files", "heads", "policies", "replay", "settings", "wrappers"},
    "offline": {"checks", "rollout"},
    "stacking": {"replay"},
    "memory": set(),
    "replay_setup": {"checks", "conversion", "memory", "replay", "stacking"},
    "dqn": {
        "acting", "checks", "conversion", "engines", "exploration", "files", "heads", "interrupts", "networks",
        "offline", "overriding", "policies", "prefill", "replay", "replay_setup", "rollout", "settings", "subprocesses",
        "support", "target_sync", "td",
    },
    "bench": {"checks", "dqn", "engines", "files", "replay", "zoo"},
    "zoo": {"dqn", "search_space"},
    "__init__": {"dqn", "policies", "replay"},
}  # fmt: skip


def imports(path):
    """Names imported by a module at run time, with whether that happens when it is loaded."""
    tree = ast.parse(path.read_text())
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node in tree.body
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node in tree.body


def parts():
    for path in ROOT.rglob("*.py"):
        yield path, path.relative_to(ROOT).with_suffix("").parts[0]


def test_every_part_imports_only_what_it_may():
    for path, part in parts():
        for name, _ in imports(path):
            if name.startswith("sb3_scratch_dqn."):
                imported = name.split(".")[1]
                assert imported == part or imported in ALLOWED[part], f"{path} imports {name}"


def test_the_picture_has_no_part_that_does_not_exist():
    assert {part for _, part in parts()} == ALLOWED.keys()


def test_only_conversion_and_benchmark_import_dqn_of_sb3_and_only_where_they_use_it():
    for path, part in parts():
        for name, when_loaded in imports(path):
            if name.startswith("stable_baselines3.dqn") or name in ("stable_baselines3.DQN", "stable_baselines3"):
                assert part in ("bench", "conversion"), f"{path} imports {name}"
                assert not when_loaded, f"{path} imports {name} when it is loaded"
