"""Configurations: what they refuse, that they survive the disk, and how flags become one."""

from __future__ import annotations

import io
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from adaptive_loss import picture
from adaptive_loss.errors import RunError, UsageError
from adaptive_loss.utils.commands import command, parse, parse_numbers
from adaptive_loss.utils.config import (
    RunConfig,
    Settings,
    differences,
    from_json,
    resolve_device,
    run_config,
    start_weights,
    to_json,
    validate,
)


@dataclass(frozen=True, kw_only=True)
class Flags(Settings):
    """Flags of a command."""

    seeds: tuple[int, ...] = (1, 42)
    """Seeds."""
    dry_run: bool = False
    """Start nothing."""


def flags(*argv: str) -> Flags:
    return parse(Flags, argv, "prog", "A command.")


def test_json_round_trip_keeps_every_field() -> None:
    config = RunConfig(weights={"ce": 1.0, "kd": 0.25}, subset=500, data_dir=Path("a/b"), mode="full", seed=7, lr=3e-4)
    assert from_json(json.loads(json.dumps(to_json(config)))) == config


@pytest.mark.parametrize("notice", [None, Path("a/leave")])
def test_how_a_run_is_kept_survives_the_disk_and_is_no_part_of_what_it_is(notice: Path | None) -> None:
    config = RunConfig(save_every="7s", resume=False, preempt_file=notice)
    assert from_json(json.loads(json.dumps(to_json(config)))) == config
    assert differences(config, RunConfig()) == []


@pytest.mark.parametrize("every", ["0", "-1", "0s", "nans", "infs", "1.5", "often", "", "s", "3m"])
def test_useless_intervals_are_refused_with_their_flag(every: str) -> None:
    with pytest.raises(UsageError, match=r"--save-every is '.*'; give a number of steps such as 200, or seconds"):
        validate(RunConfig(save_every=every))


def test_flags_of_keeping() -> None:
    parsed = flags("--save-every", "5", "--no-resume", "--preempt-file", "leave")
    assert (parsed.save_every, parsed.resume, parsed.preempt_file) == ("5", False, Path("leave"))
    assert flags("--resume").resume


def test_unknown_field_of_a_saved_configuration_is_named() -> None:
    with pytest.raises(UsageError, match="momentum"):
        from_json({"momentum": 0.9})


@pytest.mark.parametrize("name", ["epochs", "batch_size", "lr"])
@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf])
def test_useless_numbers_are_refused_with_their_flag(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"--{name.replace('_', '-')}"):
        validate(replace(RunConfig(), **{name: value}))


@pytest.mark.parametrize("weight", [-0.5, math.nan, math.inf])
def test_useless_weights_are_refused_with_their_term(weight: float) -> None:
    with pytest.raises(UsageError, match="kd="):
        validate(RunConfig(weights={"kd": weight}))


@pytest.mark.parametrize("change", [{"task": "x"}, {"dataset": "x"}, {"mode": "x"}, {"weighting": "x"}])
def test_unknown_names_are_refused_with_the_choices(change: dict[str, str]) -> None:
    name = next(iter(change))
    with pytest.raises(UsageError, match=f"--{name}: unknown {name} 'x'; choose from"):
        validate(replace(RunConfig(), **change))


@pytest.mark.parametrize(("name", "most"), [("seed", 2**64 - 1), ("data_seed", 2**64 - 1), ("threads", 1024)])
def test_whole_numbers_beyond_what_torch_takes_are_refused(name: str, most: int) -> None:
    for good in (0, most):
        validate(RunConfig(**{name: good}))
    for bad in (-1, most + 1):
        with pytest.raises(UsageError, match=f"--{name.replace('_', '-')} is {bad}; give 0 to {most}"):
            validate(RunConfig(**{name: bad}))


def test_start_weights_default_to_one_and_know_the_terms() -> None:
    assert start_weights(RunConfig(weights={"kd": 0}), ["ce", "kd"]) == {"ce": 1.0, "kd": 0.0}
    with pytest.raises(UsageError, match="unknown term 'kl'; choose from: ce, kd"):
        start_weights(RunConfig(weights={"kl": 1}), ["ce", "kd"])
    with pytest.raises(UsageError, match="every term at 0"):
        start_weights(RunConfig(weights={"ce": 0, "kd": 0}), ["ce", "kd"])


def test_differences_ignore_where_data_lies_and_what_computes() -> None:
    here = RunConfig(epochs=30)
    assert differences(replace(here, data_dir=Path("/x"), device="cpu", threads=4), here) == []
    assert differences(RunConfig(), here) == ["epochs 25 there, 30 here"]


def test_a_study_s_flags_become_its_runs() -> None:
    config = run_config(flags("--epochs", "3"), mode="full", seed=9)
    assert (config.epochs, config.mode, config.seed) == (3, "full", 9)


def test_cuda_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert resolve_device("auto") == "cpu"
    with pytest.raises(UsageError, match="--device cuda"):
        resolve_device("cuda")


@pytest.mark.parametrize("flag", ["--batch-size", "--batch_size"])
def test_hyphens_and_underscores_are_the_same(flag: str) -> None:
    assert flags(flag, "5").batch_size == flags(f"{flag}=5").batch_size == 5


def test_several_values_after_one_flag() -> None:
    parsed = flags("--seeds", "1", "2", "3", "--weights", "ce=1", "kd=1e-2", "--dry_run")
    assert (parsed.seeds, parsed.weights, parsed.dry_run) == ((1, 2, 3), {"ce": 1.0, "kd": 0.01}, True)


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--bogus", "3"], "unknown option --bogus"),
        (["--epoch", "3"], "did you mean --epochs?"),
        (["--epochs"], "--epochs needs a value"),
        (["--epochs", "many"], "--epochs: 'many' is not a whole number"),
        (["--lr", "fast"], "--lr: 'fast' is not a number"),
        (["--subset", "x"], "--subset: 'x' is not a value it takes"),
        (["--seeds", "1", "x"], "--seeds: '1', 'x' is not a list of values it takes"),
        (["--augment", "all"], "--augment: unknown value 'all'; choose from: 'standard', 'none'"),
        (["--weights", "ce"], "'ce' is not TERM=NUMBER"),
        (["--weights"], "--weights: no term is named"),
        (["stray"], "unknown option stray"),
    ],
)
def test_parse_errors_are_one_line_that_names_the_flag(argv: list[str], line: str) -> None:
    with pytest.raises(UsageError) as caught:
        flags(*argv)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "prog --help" in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "cp1252"])  # tyro draws another box for each kind of terminal
@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--lr", "fast"], "--lr: 'fast' is not a number (see prog --help)"),
        (["--epoch", "3"], "unknown option --epoch, 3; did you mean --epochs? (see prog --help)"),
    ],
)
def test_parse_errors_are_the_same_on_every_terminal(
    encoding: str, argv: list[str], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    with pytest.raises(UsageError) as caught:
        flags(*argv)
    assert str(caught.value) == line


def test_an_argument_that_is_missing_is_named() -> None:
    with pytest.raises(UsageError) as caught:
        parse(picture.Flags, [], "prog", "")
    assert str(caught.value).startswith("PATH is missing: A run's folder")


@pytest.mark.parametrize("item", ["ce", "ce=", "=1", "ce=x"])
def test_weights_that_cannot_be_read(item: str) -> None:
    with pytest.raises(ValueError, match="TERM=NUMBER"):
        parse_numbers([item])


def test_a_term_given_twice() -> None:
    with pytest.raises(ValueError, match="twice"):
        parse_numbers(["ce=1", "ce=2"])


@pytest.mark.parametrize("flag", ["--weights", "--targets"])
def test_what_is_given_twice_for_several_terms_is_not_dropped(flag: str) -> None:
    with pytest.raises(UsageError, match=f"{flag} is given twice"):
        flags(flag, "ce=1", f"{flag}=kd=2")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("bad --flag"), 2),
        (RunError("no\ndisk"), 1),
        (OSError(28, "No space left on device"), 1),
        (KeyboardInterrupt(), 130),
        (ModuleNotFoundError("x", name="joblib"), 1),
    ],
)
def test_errors_are_one_line_and_a_code(error: BaseException, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    @command
    def main(argv: object = None) -> int:
        raise error

    assert main([]) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1


def test_a_file_that_cannot_be_opened_is_named_with_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    @command
    def main(argv: object = None) -> int:
        raise PermissionError(13, "Permission denied", "/results/x")

    assert main([]) == 1
    assert capsys.readouterr().err == (
        "error: /results/x: Permission denied; check the path, its rights and the free space\n"
    )


def test_a_programming_error_is_not_hidden() -> None:
    @command
    def main(argv: object = None) -> int:
        raise ModuleNotFoundError("no module", name="adaptive_loss.nowhere")

    with pytest.raises(ModuleNotFoundError):
        main([])


def test_flags_from_a_file_give_way_to_typed_ones(tmp_path: Path) -> None:
    file = tmp_path / "study.json"
    file.write_text(json.dumps({"epochs": 3, "seeds": [4, 5], "weights": {"kd": 0.5}, "dry_run": True}))

    @dataclass(frozen=True, kw_only=True)
    class WithFile(Flags):
        """Flags with a file."""

        config: Path | None = None
        """The file."""

    parsed = parse(WithFile, ["--config", str(file), "--epochs", "7"], "prog", "A command.")
    assert (parsed.epochs, parsed.seeds, parsed.weights, parsed.dry_run) == (7, (4, 5), {"kd": 0.5}, True)
    file.write_text(json.dumps({"weights": {}}))
    assert parse(WithFile, ["--config", str(file)], "prog", "A command.").weights == {}


def test_a_file_of_another_command_s_flags_is_refused_by_its_name(tmp_path: Path) -> None:
    file = tmp_path / "study.json"
    file.write_text(json.dumps({"epochs": 3, "controls": True}))
    with pytest.raises(UsageError, match=r"study\.json: 'controls' is no flag of this command"):
        flags("--config", str(file))


@pytest.mark.parametrize("content", ["", "[1]", "{"])
def test_a_damaged_file_of_flags(tmp_path: Path, content: str) -> None:
    file = tmp_path / "study.json"
    file.write_text(content)
    with pytest.raises(UsageError, match=r"study\.json"):
        flags("--config", str(file))


@pytest.mark.parametrize("damage", [{"weights": 3}, {"weights": "x"}, {"data_dir": 5}, {"mode": 5}, {"task": ["vae"]}])
def test_a_damaged_stored_configuration_is_one_line(damage: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="a stored configuration is damaged"):
        from_json({**to_json(RunConfig()), **damage})
