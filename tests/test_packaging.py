"""What is shipped, what is pinned, and who may import whom."""

from __future__ import annotations

import ast
import json
import re
import stat
import sys
from pathlib import Path

import pytest

from adaptive_loss import __version__
from adaptive_loss.trainer.run_ablation_study import Flags as AblationFlags
from adaptive_loss.trainer.run_phase1_experiments import Flags as Phase1Flags
from adaptive_loss.utils.commands import parse

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "adaptive_loss"
FILES = sorted(PACKAGE.rglob("*.py"))

# Who may import whom: a part may import itself, the parts it lists, and what those list.
FOUNDATION = {"environments", "errors", "files", "locks", "registry", "seeding"}
PARTS: dict[str, set[str]] = {
    "buckets": set(),
    "policy_files": {"records", "signals"},
    "events": set(),
    "units": set(),
    "losses": {"buckets", "units"},
    "parallel": set(),
    "gradients": {"parallel"},
    "signals": {"losses", "gradients"},
    "lookahead": {"signals"},
    "guards": {"losses", "gradients"},
    "spike_gate": set(),
    "optimizer_memory": set(),
    "live_look": {"lookahead"},
    "step_record": {"modulator", "live_look"},
    "history": set(),
    "foreign_steps": set(),
    "weigher": {"step_record", "guards"},
    "gradient_gate": {"guards", "step_record"},
    "identity": {"modulator"},
    "quarantine": {"events", "losses"},
    "term_gate": {"quarantine", "spike_gate", "step_record", "guards"},
    "diagnosis": {"step_record"},
    "metrics": {"data", "models", "utils"},
    "probes": {"losses", "gradients", "metrics"},
    "knob": {"events"},
    "weighting": {"events", "knob", "signals", "lookahead"},
    "modulator": {"weighting"},
    "rl": {"weighting"},
    "meta_controller": {"modulator", "guards", "policy_files"},
    "loss_monitor": {"modulator", "guards", "rl", "policy_files"},
    "loss_executor": {
        "foreign_steps",
        "weigher",
        "term_gate",
        "gradient_gate",
        "diagnosis",
        "identity",
        "history",
        "optimizer_memory",
        "loss_monitor",
        "meta_controller",
    },
    "rollback": {"loss_executor"},
    "modes": {"loss_monitor", "meta_controller"},
    "data": set(),
    "models": set(),
    "analysis": set(),
    "records": {"analysis"},
    "ledger": {"records"},
    "checkpoint": {"records"},
    "report": {"records"},
    "utils": {"records"},
    "tasks": {"data", "models", "probes", "utils", "losses", "weighting"},
    "trainer": {"tasks", "modes", "loss_executor", "picture", "report", "ledger", "checkpoint"},
    "meta": {"trainer"},
    "demo": {"trainer"},
    "picture": {"report", "utils"},
    "rebuild": {"ledger", "utils"},
    "catalogue": {"weighting", "utils"},
    "doctor": {"trainer"},
}
# Registries name plug-ins without importing them, so a configuration can be checked by name alone.
NAMES_ONLY = {"data", "modes", "tasks", "weighting"}


def part_of(module: str) -> str:
    """The part of the package that a dotted module belongs to."""
    pieces = module.split(".")
    if pieces[-1] == "simple_ablation_analysis":
        return "analysis"
    return pieces[1] if len(pieces) > 1 else ""


def imports(file: Path) -> set[str]:
    """Every module that a file imports, at any depth."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, f"{file}: write imports in full"
            found |= {_target(node.module, alias.name) for alias in node.names}
    return found


def _target(module: str, name: str) -> str:
    """``from adaptive_loss.data import datasets`` names the package; ``… import base`` its module."""
    inside = ROOT.joinpath(*module.split("."), name)
    return f"{module}.{name}" if inside.with_suffix(".py").exists() or inside.is_dir() else module


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def allowed(part: str) -> set[str]:
    reached, todo = FOUNDATION | {part}, [part]
    while todo:
        for other in PARTS[todo.pop()] - reached:
            reached.add(other)
            todo.append(other)
    return reached


def top_level(file: Path) -> set[str]:
    """The top-level packages that importing the file imports, what is put off to its functions left out."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    nodes = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_who_may_import_whom(file: Path) -> None:
    module = module_of(file)
    part = part_of(module)
    if part in {"", "cli", "__main__"} | FOUNDATION:
        return
    assert part in PARTS, f"{module}: give the new part its place in PARTS"
    for target in imports(file):
        if not target.startswith("adaptive_loss.") or _by_name_only(module, target):
            continue
        assert part_of(target) in allowed(part), f"{module} must not import {target}"


def _by_name_only(module: str, target: str) -> bool:
    return module == "adaptive_loss.utils.config" and target.removeprefix("adaptive_loss.") in NAMES_ONLY


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_nothing_imports_the_doorway_or_the_command_line(file: Path) -> None:
    names = imports(file)
    assert not [name for name in names if name.split(".")[0] in ("src", "tests", "benchmarks")]
    if module_of(file) != "adaptive_loss.__main__":
        assert "adaptive_loss.cli" not in names


def test_data_and_models_know_no_training_code() -> None:
    assert allowed("data") == FOUNDATION | {"data"}
    assert allowed("models") == FOUNDATION | {"models"}


def test_results_are_read_with_the_standard_library_alone() -> None:
    branch = [PACKAGE / "records.py", PACKAGE / "trainer/simple_ablation_analysis.py", *PACKAGE.glob("report/*.py")]
    for file in [*branch, PACKAGE / "trainer/__init__.py", PACKAGE / "errors.py", PACKAGE / "registry.py"]:
        assert top_level(file) <= set(sys.stdlib_module_names) | {"adaptive_loss"}, file
    analysis = PACKAGE / "trainer/simple_ablation_analysis.py"
    assert not [name for name in imports(analysis) if name.startswith("adaptive_loss")]


def test_the_doorway_has_no_logic() -> None:
    for file in (ROOT / "src").rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        kinds = (ast.FunctionDef, ast.ClassDef, ast.For, ast.While, ast.Try)
        assert not [node for node in ast.walk(tree) if isinstance(node, kinds)], file


def test_every_folder_of_modules_is_a_package() -> None:
    for file in [*FILES, *(ROOT / "src").rglob("*.py")]:
        assert (file.parent / "__init__.py").exists(), file.parent


def project() -> dict[str, object]:
    tomllib = pytest.importorskip("tomllib")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def pins() -> dict[str, str]:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pairs}


def test_the_wheel_ships_the_package_and_not_the_doorway() -> None:
    config = project()
    assert config["tool"]["hatch"]["build"]["targets"]["wheel"] == {"packages": ["adaptive_loss"]}  # type: ignore[index]
    assert config["project"]["scripts"] == {"adaptive-loss": "adaptive_loss.cli:main"}  # type: ignore[index]
    assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)


def test_torch_comes_first_without_a_build_tag_and_torchvision_never() -> None:
    assert next(iter(pins().items())) == ("torch", "2.13.0")
    assert "torchvision" not in pins()
    assert not [version for version in pins().values() if "+" in version]


def test_every_extra_is_pinned() -> None:
    config = project()["project"]
    extras = dict(config["optional-dependencies"])  # type: ignore[index]
    assert extras.pop("inception") == ["torch-fidelity>=0.4,<0.5"]  # which would bring torchvision, so it is no pin
    wanted = [*config["dependencies"], *(name for extra in extras.values() for name in extra)]  # type: ignore[index]
    assert not [name for name in wanted if "inception" in name or "fidelity" in name]
    names = {re.sub(r"[-_.]+", "-", re.split(r"[\[<>=]", name)[0]).lower() for name in wanted}
    assert names - {"adaptive-loss"} <= set(pins())
    assert not [name for name in wanted if name.startswith("torch") and "<" in name]  # an installed build stays


@pytest.mark.parametrize("file", sorted((ROOT / "experiments").glob("*.json")), ids=lambda file: file.stem)
def test_committed_configurations_are_flags_of_their_command(file: Path) -> None:
    flags = Phase1Flags if file.stem.startswith("phase1") else AblationFlags
    parsed = parse(flags, ["--config", str(file)], "prog", "A study.")
    assert list(parsed.seeds) == json.loads(file.read_text(encoding="utf-8"))["seeds"]


@pytest.mark.parametrize("name", [".ci/run", "scripts/run_experiments.sh"])
def test_scripts_stop_at_the_first_error_and_can_be_run(name: str) -> None:
    file = ROOT / name
    assert file.stat().st_mode & stat.S_IXUSR
    assert "set -euo pipefail" in file.read_text(encoding="utf-8")
