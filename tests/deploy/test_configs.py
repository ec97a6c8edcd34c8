"""Every committed configuration is one that `rollcast` takes."""

from pathlib import Path

import pytest

from deployment import DEPLOY
from rollcast.config_file import load_config

FILES = sorted((DEPLOY / "configs").glob("*.toml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_loads_under_its_own_name(path: Path) -> None:
    assert load_config(path).run.name == path.stem


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.stem.startswith("cluster-")], ids=lambda path: path.stem
)
def test_a_run_on_a_cluster_keeps_its_files_where_all_nodes_see_them(path: Path) -> None:
    config = load_config(path)
    assert config.run.dir == "/runs"
    assert config.model.path.startswith("/models/")
