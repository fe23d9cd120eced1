"""The command ``adaptive-loss`` and the doorway: quick help, one-line errors, the names that others rely on."""

from __future__ import annotations

import importlib
import io
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from adaptive_loss import __version__, cli, doctor

ROOT = Path(__file__).parents[1]
TRAINERS = ["run_phase1_experiments", "run_ablation_study", "train_phase1", "train_ablation"]


def python(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("flag", ["--help", "--version", ""])
def test_help_and_version_are_quick(flag: str) -> None:
    best = 9.0
    for _ in range(5):  # the quickest of several, since other work shares the machine
        start = time.perf_counter()
        done = python("-m", "adaptive_loss", *([flag] if flag else []))
        best = min(best, time.perf_counter() - start)
        assert done.returncode == 0
    assert best < 0.4
    assert "adaptive-loss" in done.stdout


@pytest.mark.parametrize("use", ["import adaptive_loss", "from adaptive_loss import cli; cli.main(['--help'])"])
def test_neither_import_nor_help_loads_anything_heavy(use: str) -> None:
    done = python("-c", f"{use}; import sys; print(sorted({{'torch', 'numpy', 'tyro', 'rich'}} & set(sys.modules)))")
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("command", ["train", "phase1", "ablate", "doctor"])
def test_a_command_s_help_loads_no_torch(command: str) -> None:
    code = (
        f"import sys\nfrom adaptive_loss import cli\ntry: cli.main(['{command}', '--help'])\nexcept SystemExit: pass\n"
    )
    done = python("-c", code + "print('torch' in sys.modules)")
    assert "--json" in done.stdout
    assert done.stdout.splitlines()[-1] == "False"


def test_importing_opens_no_file_socket_or_process() -> None:
    code = """
import sys
opened = []
def audit(event, args):
    if event.split(".")[0] in ("socket", "subprocess", "shutil") or event in ("os.system", "os.exec", "os.mkdir"):
        opened.append(event)
    elif event == "open" and not str(args[0]).endswith((".py", ".pyc")) and "w" in str(args[1]):
        opened.append(args[0])
sys.addaudithook(audit)
import adaptive_loss, adaptive_loss.cli, adaptive_loss.records, adaptive_loss.utils.config, adaptive_loss.data
import adaptive_loss.trainer.run_ablation_study, adaptive_loss.trainer.train_task, adaptive_loss.modes
print(opened)
"""
    done = python("-B", "-c", code)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_terminal_without_greek_gets_escapes(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(shown, encoding=encoding))
    assert cli.main(["rules", "uncertainty"]) == 0
    sys.stdout.flush()
    assert rb"\u03c3" in shown.getvalue()


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["analyse"]) == 2
    assert capsys.readouterr().err == "error: unknown command 'analyse'; did you mean analyze?\n"
    assert cli.main(["xyz"]) == 2
    assert "choose from: demo, train" in capsys.readouterr().err


def test_arguments_reach_the_command_and_its_code_comes_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["ablate", "--output_dir", str(tmp_path / "a"), "--dry-run", "--dataset", "digits", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["to_do"] == 20
    assert cli.main(["phase1", "--epochs", "0"]) == 2
    assert cli.main(["analyze", str(tmp_path / "nowhere")]) == 1


def test_interruption(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(argv: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("adaptive_loss.doctor.main", interrupted)
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err.count("\n") == 1


def test_train_takes_a_task_and_one_way_to_name_a_mode(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    common = ["--dry-run", "--json", "--output-dir", str(tmp_path)]
    assert cli.main(["train", "vae", "--adaptive", *common]) == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["mode"] == "adaptive"
    assert cli.main(["train", "vae", "--adaptive", "--mode", "full", *common]) == 2
    assert "exclude each other" in capsys.readouterr().err
    assert cli.main(["train", "nothing", *common]) == 2
    assert "unknown task 'nothing'" in capsys.readouterr().err


def test_short_forms_of_a_task_leave_what_was_asked_for(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    train = ["train", "vae", "--json", "--subset", "100", "--batch-size", "40", "--output-dir"]
    assert cli.main([*train, str(tmp_path / "a"), "--smoke", "--objective", "sample-quality", "--adaptive"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["epochs"] == 1 and {"test_own_kid", "test_own_frechet", "test_bits_per_dim"} <= set(row)
    config = json.loads((Path(row["folder"]) / "config.json").read_text(encoding="utf-8"))
    assert config["subset"] == 100 and config["objective"] == "sample_quality"
    assert cli.main([*train, str(tmp_path / "b"), "--quick", "--epochs", "2", "--dry-run"]) == 0
    assert cli.main([*train, str(tmp_path / "c"), "--quick", "--smoke"]) == 2
    assert "exclude each other" in capsys.readouterr().err
    assert cli.main([*train, str(tmp_path / "d"), "--smoke", "--objective", "fid"]) == 2
    assert "--objective fid is not one of this task's" in capsys.readouterr().err


def test_names_with_hyphens_are_the_same_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = ["train", "vae", "--smoke", "--subset", "100", "--batch-size", "40", "--output-dir", str(tmp_path)]
    assert cli.main([*train, "--model", "conv_vae", "--mode", "base-only"]) == 0
    assert cli.main([*train, "--model", "conv-vae", "--mode", "base_only"]) == 0
    assert "done before" in capsys.readouterr().out


def test_doctor_is_json_and_text(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert doctor.main(["--json", "--data-dir", str(tmp_path / "not/there")]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["adaptive_loss"] == __version__
    assert result["deterministic"] is True
    text = doctor.describe(result | {"missing_extras": ["meta", "rl"]})
    assert "pip install 'adaptive-loss[meta,rl]'" in text


def test_lazy_exports() -> None:
    import adaptive_loss

    for name in adaptive_loss.__all__:
        assert getattr(adaptive_loss, name) is not None
    with pytest.raises(AttributeError, match="Nothing"):
        _ = adaptive_loss.Nothing
    assert "LossExecutor" in dir(adaptive_loss)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("loss_executor", "LossExecutor"),
        ("loss_monitor", "LossMonitor"),
        ("meta_controller", "MetaController"),
        ("data.cifar10_loader", "get_cifar10_loaders"),
        ("models.simple_cnn", "SimpleCNN"),
        ("utils.config", "RunConfig"),
        ("utils.logging", "RunLogger"),
        ("utils.performance", "Timer"),
        *((f"trainer.{name}", "main") for name in TRAINERS),
    ],
)
def test_the_doorway_gives_the_same_objects(module: str, name: str) -> None:
    theirs = getattr(importlib.import_module(f"src.{module}"), name)
    assert theirs is getattr(importlib.import_module(f"adaptive_loss.{module}"), name)


@pytest.mark.parametrize("name", TRAINERS)
def test_the_doorway_s_commands_run(name: str, tmp_path: Path) -> None:
    where = ["--output", str(tmp_path / "x.csv")] if "phase1_exp" in name else ["--output_dir", str(tmp_path / "x")]
    done = python("-m", f"src.trainer.{name}", "--dataset", "digits", "--batch_size", "64", "--dry_run", *where)
    assert done.returncode == 0, done.stderr
    assert "to do" in done.stdout
    assert not list(tmp_path.iterdir())
