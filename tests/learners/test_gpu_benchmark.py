"""The GPU script, run for real on a CPU with tiny shapes: every section, every target, and the quality figures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.soak
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_learner.py"


@pytest.fixture(scope="module")
def figures():
    # Without PYTHONPATH, so that it shows what it needs; without a GPU, so that the test is the same everywhere.
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), "--tiny", "--rounds", "1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_nothing_broke_and_no_target_is_judged_on_a_cpu(figures):
    assert figures["device"] == "cpu" and figures["tiny"]
    assert not [name for name, section in figures.items() if isinstance(section, dict) and "reason" in section]
    assert len(figures["targets"]) == 4
    for target in figures["targets"]:
        assert target["reached"] is None and "value" not in target
        assert target["why"].startswith("not measured: needs a GPU")


def test_the_heads_are_near_float64(figures):
    head = figures["head"]
    assert set(head["quality"]) == {"naive", "chunked"}
    assert head["triton"] == "not measured: needs an NVIDIA GPU"
    for found in head["quality"].values():
        assert found["max_logprob_difference"] < 0.02
        assert found["relative_gradient_difference"] < 0.02
    for rows in ("64", "256"):
        for side in head[rows].values():
            assert side["tflops"] == pytest.approx(8 * int(rows) * 32 * 512 / side["seconds"] / 1e12)


def test_attention_is_near_float64(figures):
    assert figures["attention"]["quality"]["calls"] < 0.05
    assert figures["attention"]["flex"].startswith("not measured")
    assert all(figures["attention"][case]["calls"]["tflops"] > 0 for case in ("one_sequence", "shared_prompt"))


@pytest.mark.parametrize("name", ["step-0.6b", "step-4b"])
def test_steps_have_speed_and_ratio(figures, name):
    section = figures[name]
    assert section["quality"]["max_logprob_difference"] < 0.1
    for rows, sequences in (("64", 1), ("256", 2)):
        row = section[rows]
        assert row["sequences"] == sequences
        assert row["rl"]["tokens_per_s"] == pytest.approx(int(rows) / row["rl"]["seconds"])
        assert row["rl"]["mfu"] is None  # A CPU's peak is in no table.
        assert row["rl_over_supervised"] == pytest.approx(row["supervised"]["seconds"] / row["rl"]["seconds"])


def test_packing_is_the_same_batch_in_fewer_rows(figures):
    packing = figures["packing"]
    assert packing["padded"]["rows"] > packing["packed"]["rows"] > packing["shared"]["rows"]
    assert all(gap < 0.1 for gap in packing["agreement"].values())
    assert packing["packed_over_padded"] > 0
