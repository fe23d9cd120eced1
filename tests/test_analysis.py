"""The statistics against scipy, and the command as people call it: alone, on whole, partial and damaged results."""

from __future__ import annotations

import json
import math
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from adaptive_loss.trainer import simple_ablation_analysis as analysis

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "adaptive_loss" / "trainer" / "simple_ablation_analysis.py"
ACCURACY = {"baseline": 0.66, "monitor_only": 0.68, "controller_only": 0.69, "full": 0.71}


def row(mode: str, seed: int, accuracy: float | None, status: str = "ok") -> dict[str, Any]:
    loss = None if accuracy is None else 1.0 - accuracy
    values = (mode, seed, status, 30, 960, accuracy, loss, accuracy, 0, 3, 1.5)
    return dict(zip(analysis.COLUMNS, values, strict=True))


def study(seeds: Sequence[int] = (1, 2, 3, 4, 5), modes: Sequence[str] = analysis.MODES) -> list[dict[str, Any]]:
    draw = random.Random(7)
    return [row(mode, s, round(ACCURACY.get(mode, 0.7) + draw.gauss(0, 0.004), 4)) for mode in modes for s in seeds]


def write(folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    lines = [",".join("" if value is None else str(value) for value in r.values()) for r in rows]
    (folder / "ablation_results.csv").write_text("\n".join([",".join(analysis.COLUMNS), *lines]) + "\n")
    return folder


def call(*arguments: object, code: int = 0, env: dict[str, str] | None = None) -> str:
    """Run the file alone in an isolated interpreter; check the exit code, and that nothing ends in a traceback."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(SCRIPT), *map(str, arguments)], capture_output=True, text=True, env=env
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    if code and not done.stdout:
        assert len(done.stderr.strip().splitlines()) == 1
    return done.stdout + done.stderr


def _without_one_accuracy(text: str) -> str:
    lines = text.splitlines()
    cells = lines[1].split(",")
    cells[analysis.COLUMNS.index("test_accuracy")] = ""
    return "\n".join([lines[0], ",".join(cells), *lines[2:]]) + "\n"


class TestStatistics:
    @pytest.mark.parametrize("df", [1, 2, 3, 4, 5, 9, 10, 47, 48, 200, 1001])
    @pytest.mark.parametrize("level", [0.5, 0.95, 0.999])
    def test_t_quantile_is_scipys(self, df: int, level: float) -> None:
        stats = pytest.importorskip("scipy.stats")
        assert analysis.t_quantile(df, level) == pytest.approx(stats.t.ppf((1 + level) / 2, df), rel=1e-9)

    def test_t_quantile_golden(self) -> None:
        # two-sided 95% points as printed in tables of Student's t (NIST handbook 1.3.6.7.2)
        for df, value in ((1, 12.706), (4, 2.776), (9, 2.262), (30, 2.042)):
            assert analysis.t_quantile(df) == pytest.approx(value, abs=5e-4)

    def test_mean_interval(self) -> None:
        # by hand: mean 2, s = 1, n = 3, half-width 4.302653 / sqrt(3)
        low, high = analysis.mean_interval([1.0, 2.0, 3.0]) or (0.0, 0.0)
        assert (low, high) == (pytest.approx(2 - 2.484138, abs=1e-6), pytest.approx(2 + 2.484138, abs=1e-6))
        assert analysis.mean_interval([1.0]) is None
        assert analysis.mean_interval([]) is None

    @pytest.mark.parametrize("n", [5, 12, 30])
    def test_bca_is_scipys_within_monte_carlo_error(self, n: int) -> None:
        stats, np = pytest.importorskip("scipy.stats"), pytest.importorskip("numpy")
        draw = random.Random(n)
        values = [draw.expovariate(1.0) - 0.3 for _ in range(n)]  # skewed, so that acceleration matters
        theirs = stats.bootstrap(
            (values,), np.mean, method="BCa", n_resamples=40_000, rng=np.random.default_rng(0)
        ).confidence_interval
        ours = analysis.bca_interval(values, resamples=40_000) or (0.0, 0.0)
        tolerance = 0.03 * (theirs.high - theirs.low)
        assert ours == (pytest.approx(theirs.low, abs=tolerance), pytest.approx(theirs.high, abs=tolerance))

    def test_bca_differs_from_the_plain_percentiles_where_data_are_skewed(self) -> None:
        values = [0.0, 0.1, 0.1, 0.2, 0.2, 0.3, 4.0]
        draw = random.Random(0)
        means = sorted(statistics.fmean(draw.choices(values, k=7)) for _ in range(10_000))
        low, high = analysis.bca_interval(values) or (0.0, 0.0)
        assert low > means[250]
        assert high > means[9750] + 0.1

    def test_bca_depends_on_its_own_seed_alone(self) -> None:
        values = [0.3, -0.1, 0.8, 0.4]
        random.seed(1)
        first = analysis.bca_interval(values)
        random.seed(2)
        assert analysis.bca_interval(values) == first
        assert analysis.bca_interval(values, seed=1, resamples=500) != analysis.bca_interval(values, resamples=500)

    def test_bca_covers_the_mean(self) -> None:
        draw = random.Random(3)
        trials = [analysis.bca_interval([draw.gauss(1, 1) for _ in range(20)], resamples=300) for _ in range(150)]
        covered = sum(interval is not None and interval[0] < 1 < interval[1] for interval in trials)
        assert 0.86 <= covered / 150 <= 0.99

    @pytest.mark.parametrize("values", [[], [0.4], [0.0, 0.0, 0.0], [0.71 - 0.70, 0.61 - 0.60, 0.01]])
    def test_bca_without_spread_does_not_exist(self, values: list[float]) -> None:
        assert analysis.bca_interval(values) is None

    def test_bca_of_two_pairs_stays_within_them(self) -> None:
        low, high = analysis.bca_interval([1.0, 2.0]) or (0.0, 0.0)
        assert 1.0 <= low < high <= 2.0

    @pytest.mark.parametrize("values", [[0.4, 0.2, 0.9], [1, -2, 3, 4, -0.5], [1, 1, 1, -1, 0, 2], [0.1, 0.2, -0.3]])
    def test_sign_flip_is_scipys(self, values: list[float]) -> None:
        stats, np = pytest.importorskip("scipy.stats"), pytest.importorskip("numpy")
        theirs = stats.permutation_test((values,), np.sum, permutation_type="samples", n_resamples=math.inf)
        assert analysis.sign_flip_p(values) == pytest.approx(theirs.pvalue)

    def test_sign_flip_golden(self) -> None:
        # all of one sign: only the pattern itself and its mirror reach the sum, so p = 2 / 2^n
        assert analysis.sign_flip_p([0.1] * 16) == 2 / 2**16
        assert analysis.sign_flip_p([0.3, 0.1]) == 0.5
        assert analysis.sign_flip_p([-0.3, -0.1]) == 0.5

    def test_sign_flip_beyond_sixteen_is_close_to_the_normal_law(self) -> None:
        draw = random.Random(5)
        values = [draw.gauss(0.3, 1.0) for _ in range(40)]
        z = abs(sum(values)) / math.sqrt(sum(v * v for v in values))
        assert analysis.sign_flip_p(values) == pytest.approx(2 * (1 - statistics.NormalDist().cdf(z)), abs=0.015)
        assert analysis.sign_flip_p(values) == analysis.sign_flip_p(values)
        assert (analysis.sign_flip_p([1.0] * 40) or 0) > 0  # a Monte Carlo p is never 0

    @pytest.mark.parametrize("values", [[], [0.4], [0.0, 0.0]])
    def test_sign_flip_where_no_test_exists(self, values: list[float]) -> None:
        assert analysis.sign_flip_p(values) is None


class TestRows:
    def test_pairs_are_made_by_seed_not_by_place(self) -> None:
        a = [row("full", 1, 0.7), row("full", 2, 0.5), row("full", 3, 0.9)]
        b = [row("baseline", 2, 0.4), row("baseline", 4, 0.0), row("baseline", 1, 0.7)]
        result = analysis.paired(a, b)
        assert result["n_pairs"] == 2
        assert result["difference"] == pytest.approx(5.0)  # percentage points
        assert analysis.paired(a, b, "test_loss")["difference"] == pytest.approx(-0.05)  # its own unit

    def test_failed_runs_are_counted_and_make_no_pair(self) -> None:
        rows = [row("full", 1, None, "failed: NaN"), row("full", 2, 0.5), row("baseline", 1, 0.5)]
        assert analysis.summarise(rows)["full"] == {"n": 1, "failed": 1, "mean": 0.5, "std": None, "interval95": None}
        nothing = {"n_pairs": 0, "difference": None, "interval95": None, "p": None}
        assert analysis.compare(rows, [("full", "baseline")]) == [{"a": "full", "b": "baseline", **nothing}]

    @pytest.mark.parametrize("seeds", [[1], [1, 2, 3]])
    def test_identical_arms_have_neither_interval_nor_p(self, seeds: list[int]) -> None:
        a = [row("full", s, 0.5 + s / 100) for s in seeds]
        b = [row("baseline", s, 0.5 + s / 100) for s in seeds]
        assert analysis.paired(a, b) == {"n_pairs": len(seeds), "difference": 0.0, "interval95": None, "p": None}

    def test_modes_stand_in_their_own_order(self) -> None:
        rows = [row(mode, 1, 0.5) for mode in ("mine", "tuned", "full", "baseline")]
        assert analysis.modes_of(rows) == ["baseline", "full", "tuned", "mine"]
        assert list(analysis.summarise(rows)) == ["baseline", "full", "tuned", "mine"]


class TestCommand:
    def test_a_whole_study(self, tmp_path: Path) -> None:
        text = call(write(tmp_path, study()))
        assert "paired by seed" in text
        assert "recovery from untuned weights" in text
        for label in ("monitor_only - baseline", "controller_only - baseline", "full - baseline"):
            assert label in text
        best = [line for line in text.splitlines() if "(best single component)" in line]
        assert len(best) == 1
        assert "full - controller_only" in best[0]
        assert "fewer than five" not in text
        assert "controls" not in text
        assert analysis.find_results(tmp_path / "ablation_results.csv") == analysis.find_results(tmp_path)

    def test_json_says_the_same(self, tmp_path: Path) -> None:
        rows = study()
        result = json.loads(call(write(tmp_path, rows), "--json"))
        assert result["summary"] == analysis.summarise(rows)
        assert result["comparisons"] == analysis.compare(rows)
        assert (result["missing"], result["warnings"], result["seeds"]) == ([], [], [1, 2, 3, 4, 5])

    def test_controls_and_unknown_modes(self, tmp_path: Path) -> None:
        text = call(write(tmp_path, study(modes=(*analysis.MODES, *analysis.CONTROLS, "mine"))))
        for control in ("base_only", "tuned", "lookahead_only", "random_monitor"):
            assert f"full - {control}" in text
        assert "base_only_all" in text
        assert "mine" in text

    def test_three_seeds_are_warned_about(self, tmp_path: Path) -> None:
        text = call(write(tmp_path, study(seeds=(1, 42, 123))))
        assert "fewer than five seeds prove nothing" in text

    def test_old_name_of_full(self, tmp_path: Path) -> None:
        rows = [{**r, "mode": r["mode"].replace("full", "full_adaptive")} for r in study()]
        found = analysis.read_rows(analysis.find_results(write(tmp_path, rows)))
        assert found == analysis.read_rows(analysis.find_results(write(tmp_path, study())))
        assert analysis.modes_of(found) == list(analysis.MODES)

    def test_partial_results_say_what_is_missing(self, tmp_path: Path) -> None:
        rows = [r for r in study() if r["mode"] != "monitor_only" and (r["mode"], r["seed"]) != ("full", 3)]
        rows[0] = row("baseline", 1, None, "failed: loss is NaN at step 7")
        text = call(write(tmp_path, rows), code=1)
        assert "mode monitor_only is missing" in text
        assert "mode full lacks seed 3" in text
        assert "mode baseline seed 1 failed: loss is NaN at step 7" in text
        assert "controller_only - baseline" in text

    def test_what_was_asked_for_is_read_beside_the_rows(self, tmp_path: Path) -> None:
        rows = study(seeds=(1, 2))
        asked = {"config": {"modes": [*analysis.MODES, "tuned"], "seeds": [1, 2, 3, 4, 5]}}
        (tmp_path / "ablation_results.json").write_text(json.dumps(asked))
        text = call(write(tmp_path, rows), code=1)
        assert "mode tuned is missing" in text
        for mode in analysis.MODES:
            assert f"mode {mode} lacks seeds 3, 4, 5" in text

    @pytest.mark.parametrize("beside", ["", "{", "[]", '{"config": {"modes": 3, "seeds": [1]}}', "[" * 100_000])
    def test_a_damaged_json_beside_the_rows_is_passed_over(self, tmp_path: Path, beside: str) -> None:
        (tmp_path / "ablation_results.json").write_text(beside)
        assert "Missing" not in call(write(tmp_path, study()))

    def test_a_task_without_accuracy_is_judged_by_its_loss(self, tmp_path: Path) -> None:
        rows = [{**r, "test_accuracy": None, "test_loss": 24 + r["test_loss"]} for r in study()]
        result = json.loads(call(write(tmp_path, rows), "--json"))
        assert result["metric"] == "test_loss" and result["best_single"] == "controller_only"
        assert result["summary"] == analysis.summarise(rows, "test_loss")
        text = call(tmp_path)
        assert "Test loss" in text and "Contribution over baseline (nats" in text
        assert f"{result['summary']['full']['mean']:.2f}" in text

    def test_a_folder_with_the_file_s_name(self, tmp_path: Path) -> None:
        (tmp_path / "ablation_results.csv").mkdir()
        assert "run the ablation study into it first" in call(tmp_path, code=1)

    def test_nothing_finished(self, tmp_path: Path) -> None:
        rows = [row(mode, 1, None, "failed: killed") for mode in analysis.MODES]
        assert "none finished" in call(write(tmp_path, rows), code=1)
        json.loads(call(tmp_path, "--json", code=1))

    def test_an_empty_or_missing_folder(self, tmp_path: Path) -> None:
        assert "no ablation_results.csv" in call(tmp_path, code=1)
        assert "no such folder" in call(tmp_path / "nowhere", code=1)
        (tmp_path / "phase1_results.csv").touch()
        assert "phase1_results.csv pass that file" in call(tmp_path, code=1)

    @pytest.mark.parametrize(
        ("damage", "told"),
        [
            (lambda text: "", "line 1 is not the header"),
            (lambda text: text.replace("test_loss", "loss", 1), "line 1 is not the header"),
            (lambda text: text.splitlines()[0] + "\n", "holds no run"),
            (lambda text: text[: text.rstrip().rfind(",0.") - 3], "torn or damaged"),
            (lambda text: text.rstrip().removesuffix("1.5"), "train_seconds is ''"),
            (lambda text: text.replace(",0.66", ",zero.66", 1), "not a number"),
            (lambda text: text.replace(",ok,30,960,0.", ",ok,30,960,,0.", 1), "12 of 11 cells"),
            (_without_one_accuracy, "mode baseline seed 1 has no test_accuracy; write it again"),
            (lambda text: text.replace("baseline,1,ok,30,960,0.6", "baseline,1,ok,30,960,6", 1), "not a fraction"),
            (lambda text: text.replace("baseline,1,ok,30,960,0.6", "baseline,1,ok,30,960,nan ,", 1), "torn"),
            (lambda text: text.replace("baseline,1,ok,30", "baseline,1,ok,3.5", 1), "epochs is '3.5'"),
            (lambda text: text.replace(",ok,", ",fine,", 1), "neither 'ok' nor 'failed"),
            (lambda text: text.replace("full,5", "full,4"), "stands there twice"),
            (lambda text: text + '"full', "cannot be read as csv"),
            (lambda text: text + "\0\x1b[31m", "torn or damaged"),
        ],
    )
    def test_a_damaged_file_is_one_line(
        self, tmp_path: Path, damage: Any, told: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = write(tmp_path, study()) / "ablation_results.csv"
        file.write_text(damage(file.read_text()))
        assert analysis.main([str(tmp_path)]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert told in err

    def test_bytes_that_are_no_text(self, tmp_path: Path) -> None:
        (tmp_path / "ablation_results.csv").write_bytes(b"\xff\xfe\x00")
        assert "cannot be read as csv" in call(tmp_path, code=1)

    def test_a_mistake_in_the_command_line(self) -> None:
        assert "usage" in call(code=2)
        assert call("a", "b", code=2).count("\n") == 1
        assert "--jsonn" in call("somewhere", "--jsonn", code=2)

    def test_hostile_names_reach_no_terminal(self, tmp_path: Path) -> None:
        rows = [{**r, "mode": '"=cmd|x\n\x1b[2J<script>\u202e"'} if r["mode"] == "full" else r for r in study()]
        text = call(write(tmp_path, rows), code=1)
        assert "\x1b" not in text
        assert "\u202e" not in text
        assert r"=cmd|x\n\x1b[2J<script>\u202e" in text

    def test_a_terminal_without_unicode(self, tmp_path: Path) -> None:
        write(tmp_path, study())
        done = subprocess.run(
            [sys.executable, str(SCRIPT), str(tmp_path)],
            capture_output=True,
            env={**os.environ, "PYTHONIOENCODING": "ascii"},
        )
        assert done.returncode == 0, done.stderr
        assert rb"\xb1" in done.stdout

    @pytest.mark.parametrize(
        "spelling",
        [
            ("src.trainer.simple_ablation_analysis.py",),
            ("src/trainer/simple_ablation_analysis.py",),
            ("-m", "src.trainer.simple_ablation_analysis"),
            ("-m", "adaptive_loss.trainer.simple_ablation_analysis"),
        ],
    )
    def test_the_doorways(self, tmp_path: Path, spelling: tuple[str, ...]) -> None:
        expected = call(write(tmp_path, study(seeds=(1, 2))))
        # -S: no installed package can be found, as on a machine that has none
        command = [sys.executable, "-S", *spelling, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert (done.returncode, done.stdout) == (0, expected), done.stderr

    def test_the_doorways_pass_the_exit_code_on(self, tmp_path: Path) -> None:
        command = [sys.executable, "-S", "src.trainer.simple_ablation_analysis.py", str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)

    def test_the_doorway_reexports(self) -> None:
        code = "import src.trainer.simple_ablation_analysis as a; print(a.t_quantile.__module__)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
        assert done.stdout.strip() == "adaptive_loss.trainer.simple_ablation_analysis"

    def test_it_imports_the_standard_library_alone(self) -> None:
        names = {
            line.split()[1].split(".")[0]
            for line in SCRIPT.read_text().splitlines()
            if line.startswith(("import ", "from "))
        }
        assert names <= set(sys.stdlib_module_names)
