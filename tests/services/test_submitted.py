"""Inside a submitted job: whose code runs, under which Python, and what would not outlive it. No cluster."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rollcast import submitted
from rollcast.errors import ConfigError, UsageError
from rollcast.interpreter import JOB, workers_python
from rollcast.submitted import CODE, SOURCES, digest_of, refuse_other_code, refuse_passing_folder

ROOT = Path(__file__).resolve().parents[2]


def packages(folder: Path, text: str = "VERSION = 1\n") -> dict[str, Path]:
    """The three packages below `folder`, as the repository has them."""
    found = {name: folder / source / name for name, source in SOURCES.items()}
    for path in found.values():
        path.mkdir(parents=True)
        (path / "__init__.py").write_text(text)
    return found


def test_outside_of_a_job_any_code_may_run(tmp_path: Path) -> None:
    shipped, installed = packages(tmp_path / "shipped"), packages(tmp_path / "installed")
    refuse_other_code(installed, tmp_path / "shipped", {CODE: digest_of(shipped)})
    with pytest.raises(UsageError, match="is not the one that was shipped"):
        refuse_other_code(installed, tmp_path / "shipped", {JOB: "{}"})


def test_a_wheel_of_the_image_is_refused_beside_shipped_folders(tmp_path: Path) -> None:
    shipped, installed = packages(tmp_path / "shipped"), packages(tmp_path / "installed")
    refuse_other_code(shipped, tmp_path / "shipped", {JOB: "{}"})
    with pytest.raises(UsageError) as caught:
        refuse_other_code(installed | {"rollcast": shipped["rollcast"]}, tmp_path / "shipped", {JOB: "{}"})
    assert "rollcast_learners from" in caught.value.why and "rollcast_envs from" in caught.value.why
    assert f"rollcast from {tmp_path}" not in caught.value.why
    assert "deploy/runtime_env.yaml" in caught.value.fix


def test_nothing_is_refused_where_nothing_was_shipped(tmp_path: Path) -> None:
    image = packages(tmp_path / "image")
    refuse_other_code(image, tmp_path, {JOB: "{}"})
    packages(tmp_path)
    with pytest.raises(UsageError, match="is not the one that was shipped"):
        refuse_other_code(image, tmp_path, {JOB: "{}"})


def test_shipped_code_is_known_by_its_digest(tmp_path: Path) -> None:
    same, other = packages(tmp_path / "a"), packages(tmp_path / "c", "VERSION = 0\n")
    environ = {JOB: "{}", CODE: digest_of(packages(tmp_path / "b"))}
    refuse_other_code(same, tmp_path, environ)
    with pytest.raises(UsageError, match="is not the one that was shipped"):
        refuse_other_code(other, tmp_path, environ)


def test_a_digest_is_of_names_and_contents(tmp_path: Path) -> None:
    found = packages(tmp_path)
    before = digest_of(found)
    (found["rollcast"] / "data.json").write_text("{}")
    assert digest_of(found) == before, "only code counts"
    (found["rollcast"] / "__init__.py").rename(found["rollcast"] / "other.py")
    assert digest_of(found) != before


@pytest.mark.parametrize(
    ("run_dir", "why"), [("runs", "it is relative"), ("{session}/runs", "Ray's own folder"), ("{cwd}/x", "Ray's own")]
)
def test_a_run_folder_that_goes_with_the_job_is_refused(tmp_path: Path, run_dir: str, why: str) -> None:
    session = tmp_path / "session_1"
    cwd = session / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    named = run_dir.format(session=session, cwd=cwd)
    refuse_passing_folder(named, cwd, {})
    refuse_passing_folder(str(tmp_path / "runs"), cwd, {JOB: "{}"})
    with pytest.raises(ConfigError) as caught:
        refuse_passing_folder(named, cwd, {JOB: "{}"})
    assert why in caught.value.why and "--run.dir /data/runs" in caught.value.fix


def test_variables_of_the_job_are_read() -> None:
    assert submitted.job_variables({JOB: json.dumps({"runtime_env": {"env_vars": {"A": "1"}}})}) == {"A": "1"}
    assert submitted.job_variables({JOB: json.dumps({"runtime_env": {}})}) == {}
    assert submitted.job_variables({}) == {}


# ---- the interpreter


def test_the_interpreter_is_found_above_the_job(tmp_path: Path) -> None:
    tree = {  # pid -> its parent and its arguments
        30: (20, ["/bin/sh", "-c", "python3 -m rollcast train x.toml"]),
        20: (10, ["ray::JobSupervisor"]),
        10: (1, ["/ray/raylet", "--node_id=1", "--python_worker_command=/opt/venv/bin/python /ray/default_worker.py"]),
    }
    for pid, (parent, arguments) in tree.items():
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "cmdline").write_text("\0".join(arguments))
        (tmp_path / str(pid) / "stat").write_text(f"{pid} (a (strange) name) S {parent} 1 1")
    assert workers_python(30, tmp_path) == "/opt/venv/bin/python"
    assert workers_python(1, tmp_path) is None
    assert workers_python(99, tmp_path) is None


def test_a_python_without_ray_says_so_where_no_other_is_found(tmp_path: Path) -> None:
    """An isolated interpreter sees no installed package, as the system's own would."""
    script = f"import sys; sys.path.insert(0, {str(ROOT / 'services')!r}); sys.argv[0] = 'x'\n"
    script += "from rollcast.interpreter import hand_over; hand_over(['runs'])"
    words = [sys.executable, "-S", "-E", "-c", script]
    done = subprocess.run(words, env={JOB: "{}", "PATH": ""}, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("This Python has no Ray.\nwhy: ") and "do this: " in done.stderr


def test_it_goes_on_under_the_one_that_is_named(tmp_path: Path) -> None:
    other = tmp_path / "python"
    other.write_text('#!/bin/sh\necho "went on: $@"\n')
    other.chmod(0o755)
    script = f"import sys; sys.path.insert(0, {str(ROOT / 'services')!r})\n"
    script += "from rollcast.interpreter import hand_over; hand_over(['status', 'a run'])"
    words = [sys.executable, "-S", "-E", "-c", script]
    environ = {JOB: "{}", "PATH": "", "ROLLCAST_PYTHON": str(other)}
    done = subprocess.run(words, env=environ, capture_output=True, text=True, check=False)
    assert done.stdout == "went on: -m rollcast status a run\n", done.stderr
