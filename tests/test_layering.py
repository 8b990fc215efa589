"""Imports go down only, and siblings never import each other (DESIGN, Layers)."""

from __future__ import annotations

import ast
from pathlib import Path

import autoprune

PACKAGE = Path(autoprune.__file__).parent
LAYERS = [
    {"core"},
    {"findings", "writing", "dispatch", "telling", "drawing", "waiting"},
    {"units", "borrowing", "keywords", "handing", "rows", "untrusted", "crew"},
    {
        "reading",
        "recording",
        "traced",
        "slice_rules",
        "criteria",
        "meters",
        "allocate",
        "bound",
        "recover",
        "sweep",
        "weights",
    },
    {
        "label_rules",
        "label_contractions",
        "label_recurrent",
        "grouping",
        "finalists",
        "descent",
        "pruning_env",
        "reconstruct",
        "curvature",
        "dependence",
        "race",
        "recipe",
        "regularizers",
        "reuse",
        "trialfile",
    },
    {"tracing", "blocks", "probe", "proof", "agent", "activations"},
    {"masks"},
    {"space"},
    {"lease", "lineage", "outset", "prune", "rounds", "scores", "storage", "strategies", "tasks"},
    {"cache", "components", "figures", "healer", "result", "search_figures", "shared_prefix", "workers"},
    {"checks", "costs", "evaluate", "stock", "study", "surroundings"},
    {"checkup", "final", "loop", "measuring", "page", "spread", "unfinished"},
    {"answer", "console", "dashboard", "diagnosis", "live", "exporting", "report", "testing", "training"},
    {"screen", "verdict"},
    {"run"},
    {"compare"},
    {"configuration", "manual"},
    {"completion", "runfolder"},
    {"commands"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# what strategies may see
NUMBERS = {"agent", "core", "allocate", "borrowing", "bound", "descent", "finalists", "pruning_env", "race", "sweep"}
ONLY_IN = {
    "stable_baselines3": {"agent.py"},
    "gymnasium": {"pruning_env.py"},
    "optuna": {"dashboard.py", "storage.py", "study.py", "strategies/optuna_sampler.py"},
    "ray": {"workers.py"},
    "omegaconf": {"configuration.py"},
    "hydra": {"configuration.py"},
    "optuna_dashboard": {"dashboard.py"},
    "rich": {"console.py", "live.py", "screen.py"},
    "fvcore": {"meters/counts.py"},
    "execnet": {"meters/device.py"},
    "cloudpickle": {"meters/wire.py", "meters/worker.py", "crew.py", "workers.py"},
    "onnx": {"meters/wire.py"},
    "onnxruntime": {"meters/worker.py"},
    "openvino": {"meters/worker.py"},
    "zeus": {"meters/worker.py"},
}


def imports(path: Path) -> list[str]:
    """Modules imported at run time (those for type checking only do not count)."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "autoprune":
            found += [f"autoprune.{alias.name}" for alias in node.names if not alias.name.startswith("__")]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
    return found


def home(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def modules() -> list[Path]:
    return [p for p in sorted(PACKAGE.rglob("*.py")) if home(p) not in ("__init__", "__main__")]


def test_every_module_has_a_layer() -> None:
    assert {home(p) for p in modules()} == set(LEVEL)


def test_imports_go_down_and_never_sideways() -> None:
    wrong = []
    for path in modules():
        for name in imports(path):
            if name.startswith("autoprune."):
                target = name.split(".")[1]
                if target != home(path) and LEVEL[target] >= LEVEL[home(path)]:
                    wrong.append(f"{path.relative_to(PACKAGE)} imports {name}")
    assert not wrong


def test_the_loop_sees_only_core() -> None:
    assert {n for n in imports(PACKAGE / "loop.py") if n.startswith("autoprune")} == {"autoprune.core"}


def test_core_is_standard_library_only() -> None:
    import sys

    assert {n.split(".")[0] for n in imports(PACKAGE / "core.py")} <= set(sys.stdlib_module_names)


def test_strategies_see_numbers_only() -> None:
    for path in (PACKAGE / "strategies").glob("*.py"):
        ours = {n for n in imports(path) if n.startswith("autoprune")}
        assert ours <= {f"autoprune.{name}" for name in NUMBERS}, path.name


def test_each_library_has_one_door() -> None:
    for path in modules():
        for name in imports(path):
            allowed = ONLY_IN.get(name.split(".")[0])
            assert allowed is None or str(path.relative_to(PACKAGE)) in allowed, f"{path.name} imports {name}"


def test_the_checker_sees_a_sideways_import(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text("def f():\n    from autoprune.evaluate import score\n    import autoprune.study\n")
    assert imports(tmp_path / "x.py") == ["autoprune.evaluate", "autoprune.study"]
