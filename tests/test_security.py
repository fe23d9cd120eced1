"""What SECURITY.md promises: no pickle, nothing run from a file, nothing steered by a name."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from adaptive_loss.errors import UsageError
from adaptive_loss.loss_monitor import LossMonitor
from adaptive_loss.meta_controller import MetaController
from adaptive_loss.policy_files import LARGEST_CARD
from adaptive_loss.utils.commands import complain, expand_config
from adaptive_loss.weighting import weightings

ROOT = Path(__file__).parents[1]
FOLDERS = ("adaptive_loss", "src", "benchmarks", "scripts", "tests")
MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "cloudpickle",
    "dill",
    "shelve",
    "marshal",
    "yaml",
    "jsonpickle",
    "pickletools",
}
CALLS = {
    "eval",
    "exec",
    "compile",
    "os.system",
    "os.popen",
    "pty.spawn",
    "joblib.load",
    "joblib.dump",
    "torch.hub.load",
}
METHODS = {"extractall", "extract", "read_pickle", "to_pickle", "load_pickle"}
ALLOWED = {"tests/reliability/strangers.py": {"pickle"}}  # it makes the hostile files that nothing may run


def faults(source: str) -> Iterator[str]:
    """What in a file could run code that comes from data."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            yield node.module or ""
        elif isinstance(node, ast.Call):
            yield from _call(node)


def _call(node: ast.Call) -> Iterator[str]:
    name = ast.unparse(node.func)
    options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    if name in CALLS or (name.rpartition(".")[2] in METHODS and "." in name):
        yield name
    if name == "torch.load" and options.get("weights_only") != "True":
        yield "torch.load without weights_only=True"
    if name in ("np.load", "numpy.load") and options.get("allow_pickle") != "False":
        yield "np.load without allow_pickle=False"
    if name.startswith("subprocess.") and options.get("shell") == "True":
        yield "a shell"


@pytest.mark.parametrize("folder", FOLDERS)
def test_nothing_that_runs_code_from_data(folder: Path | str) -> None:
    for file in sorted((ROOT / folder).rglob("*.py")):
        name = str(file.relative_to(ROOT))
        found = set(faults(file.read_text(encoding="utf-8"))) - ALLOWED.get(name, set())
        assert not found, f"{name}: {', '.join(sorted(found))}"


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from cloudpickle import dumps",
        "import yaml.loader",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "np.load(file)",
        "np.load(file, allow_pickle=True)",
        "archive.extractall(folder)",
        "joblib.load(file)",
        "eval(text)",
        "subprocess.run(line, shell=True)",
    ],
)
def test_the_lint_sees_it(line: str) -> None:
    assert list(faults(line))


@pytest.mark.parametrize(
    "line", ["torch.load(f, weights_only=True)", "np.load(f, allow_pickle=False)", "model.eval()", "re.compile('a')"]
)
def test_the_lint_lets_pass(line: str) -> None:
    assert not list(faults(line))


# Cards --------------------------------------------------------------------------------------------------------

CARDS = {
    "not an object": "[]",
    "nested too deeply": "[" * 100_000,
    "a number no float can hold": json.dumps({"signals_version": 1, "rho": 10**400, "sha256": 10**400}),
    "too large": " " * (LARGEST_CARD + 1),
    "no text": "\udcff",
    "empty": "",
}


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize(("kind", "name"), [(MetaController, "controller"), (LossMonitor, "monitor")])
def test_a_damaged_or_hostile_card_is_refused_in_one_line(
    tmp_path: Path, kind: type[MetaController] | type[LossMonitor], name: str, card: str
) -> None:
    """Found by the torture: deep nesting and huge integers came through as other errors."""
    text = CARDS[card].replace('"signals_version": 1', f'"signals_version": {version()}')
    (tmp_path / f"{name}.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match="cannot read the policy") as caught:
        kind.from_policy(tmp_path)
    assert "\n" not in str(caught.value)


def version() -> int:
    from adaptive_loss import signals

    return signals.VERSION


def test_a_card_for_other_signals_says_so(tmp_path: Path) -> None:
    (tmp_path / "monitor.json").write_text('{"signals_version": "\\u001b[31m"}')
    with pytest.raises(ValueError, match=r"was made for signals version '\\x1b\[31m', this is \d+: train it anew"):
        LossMonitor.from_policy(tmp_path)


# Names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [{"weighting": "evil:Rule"}, {"modes": ["full", "evil:Mode"]}, {"task": "evil:Task"}])
def test_a_configuration_file_names_no_code(tmp_path: Path, flags: dict[str, object]) -> None:
    known = ("weighting", "modes", "task", "output")
    file = tmp_path / "flags.json"
    file.write_text(json.dumps(flags))
    with pytest.raises(UsageError, match=r"evil:.* is code outside the package"):
        expand_config(["--config", str(file)], known)
    file.write_text(json.dumps({"weighting": "torchjd:UPGrad", "output": "C:x.csv"}))
    assert "torchjd:UPGrad" in expand_config(["--config", str(file)], known)


@pytest.mark.parametrize("name", ["os:_exit", "os:system", "builtins:print", "json:JSONDecoder"])
def test_what_is_no_rule_is_not_called(name: str) -> None:
    with pytest.raises(UsageError, match="is no subclass of"):
        weightings.get(name)


def test_an_error_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert complain(ValueError("a\x1b]0;owned\x07\nb\u202e"), 2) == 2
    assert capsys.readouterr().err == "error: a\\x1b]0;owned\\x07 b\\u202e\n"
