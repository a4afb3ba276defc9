"""What runs on a GPU machine: no network, no pip, limits; shown without a GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks import gpu_steps
from benchmarks.gpu_steps import Step

ROOT = Path(__file__).parents[2]
TARGETS = ("gpu-test", "gpu-sanitize", "gpu-bench")
COPIED = ("benchmarks", "csrc", "grace_fast", "kernels", "tests")


def make(*arguments, folder=ROOT, **environment):
    """Run make without what a make around the tests says."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(
        ["make", *arguments],
        cwd=folder,
        env=kept | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_uses_the_python_it_is_given_and_installs_nothing(target):
    done = make("-n", target, "PYTHON=/the/python", "OUT=/somewhere")
    assert done.returncode == 0, done.stderr
    words = done.stdout.replace("\\\n", " ").split()
    assert not {"pip", "venv", "-m pip"} & set(words)
    assert "build_ext" in words
    pythons = {word for word in words if "python" in Path(word).name and "=" not in word}
    assert pythons == {"/the/python"}
    assert "/somewhere" in words


def test_all_of_them_one_after_the_other_have_nine_minutes_each():
    lines = make("-n", "gpu").stdout.splitlines()
    started = [line for line in lines if "benchmarks.gpu_steps" in line]
    assert [line.split("gpu_steps ")[1].split()[0] for line in started] == [
        *("test", "sanitize", "bench")
    ]
    assert all("--began 1" in line for line in started)


def test_the_benchmark_has_nine_minutes_unless_it_is_told_otherwise():
    assert "--seconds 540" in make("-n", "gpu-bench").stdout
    assert "--seconds 77" in make("-n", "gpu-bench", "SECONDS=77").stdout


@pytest.mark.parametrize("steps", [gpu_steps.test_steps, gpu_steps.sanitize_steps])
def test_the_steps_of_a_target_end_inside_nine_minutes(steps, tmp_path):
    made = steps(tmp_path)
    assert sum(step.limit_s for step in made) <= gpu_steps.LONGEST_S < 540
    assert len({step.name for step in made}) == len(made)
    for step in made:
        assert not {"pip", "venv"} & set(step.command)


def test_every_sanitizer_and_the_profiler_look_at_both_engines(tmp_path):
    steps = {step.name: step.command for step in gpu_steps.sanitize_steps(tmp_path)}
    for tool in ("memcheck", "racecheck", "synccheck", "initcheck"):
        for paths in ("cuda", "triton"):
            command = " ".join(steps[f"{tool}-{paths}"])
            assert f"--tool {tool}" in command
            assert f"--paths {paths}" in command
    assert "--clock-control none" in " ".join(steps["ncu"])  # the card's settings are left alone


def test_cuda_is_tested_before_what_is_compiled_at_its_first_call(tmp_path):
    facts, cuda, triton, _ = gpu_steps.test_steps(tmp_path)
    assert facts.command == ["nvidia-smi"]
    assert "cuda or memory" in cuda.command
    assert "-n" not in cuda.command
    assert triton.command[triton.command.index("-n") + 1].isdigit()


def test_each_step_is_run_and_what_it_prints_is_kept(tmp_path, capfd):
    python = sys.executable
    steps = [
        Step("fails", 20, [python, "-c", "print('one'); raise SystemExit(3)"]),
        Step("hangs", 6, [python, "-uc", "import time; print('two'); time.sleep(60)"]),
        Step("absent", 20, ["no-such-program"]),
        Step("works", 20, [python, "-c", "import os; print(os.environ['X'])"], {"X": "three"}),
    ]
    ended = gpu_steps.run(steps, tmp_path, "test", time.time() + 100)
    assert ended == {
        "fails": "exit code 3",
        "hangs": "stopped after 6 s",
        "absent": "no-such-program is not on this machine",
        "works": "ok",
    }
    log = (tmp_path / "test.log").read_text()
    assert [word for word in log.split() if word in ("one", "two", "three")] == [
        *("one", "two", "three")
    ]
    assert len((tmp_path / "steps.txt").read_text().splitlines()) == 4
    shown = capfd.readouterr().out
    assert "one\n" in shown
    assert "== works: ok" in shown


def test_a_step_has_no_more_time_than_is_left(tmp_path):
    step = Step("late", 50, [sys.executable, "-c", ""])
    assert gpu_steps.run([step], tmp_path, "test", time.time() + 4) == {
        "late": "not run: the time is over"
    }


def test_the_benchmark_is_run_again_where_it_asks_for_it(tmp_path, monkeypatch):
    asked = []

    def run(steps, out, target, until):
        [step] = steps
        asked.append(step)
        return {step.name: ("exit code 75", "exit code -11", "ok", "ok")[len(asked) - 1]}

    monkeypatch.setattr(gpu_steps, "run", run)
    arguments = ["bench", "--out", str(tmp_path), "--seconds", "400", "--only", "dense"]
    assert gpu_steps.main(arguments) == 0
    assert [step.name for step in asked] == ["bench", "bench", "bench", "page"]
    budgets = [float(step.command[step.command.index("--budget") + 1]) for step in asked[:3]]
    assert all(300 < budget <= 375 for budget in budgets)
    monkeypatch.setattr(gpu_steps, "run", lambda steps, *_: asked.extend(steps) or {"page": "ok"})
    late = ["bench", "--out", str(tmp_path), "--began", "1000"]
    assert gpu_steps.main(late) == 1  # nothing was measured: only the page is tried
    assert asked[-1].name == "page"


def test_a_target_that_fails_says_so(tmp_path, monkeypatch, capsys):
    steps = [Step("one", 20, [sys.executable, "-c", "raise SystemExit(1)"])]
    monkeypatch.setattr(gpu_steps, "test_steps", lambda out: steps)
    assert gpu_steps.main(["test", "--out", str(tmp_path)]) == 1
    assert "one: exit code 1" in capsys.readouterr().out


@pytest.fixture(scope="module")
def nested(tmp_path_factory):
    """A virtual environment made from one; its packages are those of this Python."""
    folder = tmp_path_factory.mktemp("nested")
    outer, inner = folder / "outer", folder / "inner"
    for python, made in ((sys.executable, outer), (outer / "bin" / "python", inner)):
        command = [str(python), "-m", "venv", "--without-pip", str(made)]
        subprocess.run(command, check=True, capture_output=True)
    python = inner / "bin" / "python"
    asked = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    place = subprocess.run([python, "-c", asked], capture_output=True, text=True, check=True)
    packages = {sysconfig.get_paths()[name] for name in ("purelib", "platlib")}
    lines = [*packages, *(path for path in sys.path if path.endswith("site-packages"))]
    Path(place.stdout.strip(), "packages.pth").write_text("\n".join(dict.fromkeys(lines)))
    return python


@pytest.fixture
def checkout(tmp_path):
    """A copy of what the targets read, with what is built of it, and no installed package."""
    from grace_fast import _cpu

    folder = tmp_path / "checkout"
    folder.mkdir()
    unwanted = shutil.ignore_patterns(
        "__pycache__", "results", "golden*", "corpus", ".cache", "*.so"
    )
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, ignore=unwanted)
    for name in ("Makefile", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, folder / name)
    platform = f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    built = folder / "build" / platform / "grace_fast"
    built.mkdir(parents=True)
    shutil.copyfile(_cpu.__file__, built / Path(_cpu.__file__).name)  # newer than its sources
    return folder


def test_in_an_environment_made_from_one_the_package_is_built_and_found(nested, checkout):
    """A GPU machine's Python is in a virtual environment, whose packages another would not see."""
    pytest.importorskip("triton")
    pytest.importorskip("pybind11")
    done = make("gpu-built", f"PYTHON={nested}", folder=checkout, GRACE_FAST_CUDA="0")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "triton" in done.stdout.splitlines()[-1]
    asked = (
        "import grace_fast, grace_fast.kernels.codes as k; print(grace_fast.__file__, k.__file__)"
    )
    paths = os.pathsep.join([str(checkout / "build" / "linked"), str(checkout)])
    found = subprocess.run(
        [nested, "-c", asked],
        env=os.environ | {"PYTHONPATH": paths, "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=True,
        cwd=checkout.parent,
    )
    assert all(path.startswith(str(checkout / "build" / "linked")) for path in found.stdout.split())
