"""Random requests against the edge of the live policy: never a 500, and each refusal names a field."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from fuzzing import throw, throw_by_schema
from live_app import Asking, chat, scripted_app
from rollcast.live.keys import KeysFile, add_key, make_key


@pytest.fixture
def asking(tmp_path: Path) -> Iterator[Asking]:
    """With a key of scope `admin`, so that every route is reached."""
    key, text = make_key("fuzzer", "admin")
    add_key(tmp_path / "keys.json", key)
    client = Asking(scripted_app(KeysFile(tmp_path / "keys.json")), text)
    yield client
    client.close()


@pytest.mark.parametrize(
    ("mutated", "by_schema"),
    [pytest.param(850, 160, id="1,000"), pytest.param(9_000, 1_200, id="10,000", marks=pytest.mark.soak)],
)
def test_random_requests_never_break_the_edge(asking: Asking, mutated: int, by_schema: int) -> None:
    counts = throw(asking, mutated)
    assert counts.total() >= mutated
    assert counts[200] > mutated / 20 and counts[400] > mutated / 5, f"one-sided: {counts}"
    counts += throw_by_schema(asking, scripted_app(), by_schema)
    assert counts.total() >= mutated + by_schema * 0.9
    assert not [status for status in counts if status >= 500]
    assert asking.ask("POST", "/v1/chat/completions", chat()).status_code == 200
