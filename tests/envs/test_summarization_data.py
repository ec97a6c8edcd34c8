"""The summarization data: the script that builds it, on small sources without network, and the file that it wrote."""

import hashlib
import json
import unicodedata
from collections import Counter
from dataclasses import replace
from functools import cache
from importlib.resources import files
from random import Random
from typing import Any

import pytest

from rollcast_envs.data.building import ALIKE, likeness, to_lines, without_leaks
from rollcast_envs.data.summarization.build import (
    BOTOCORE,
    DOCUMENT_WORDS,
    OPERATIONS,
    PYTHON_PACKAGES,
    SUMMARY_WORDS,
    Candidate,
    Package,
    build_records,
    derivable,
    module_candidates,
    read_docstring,
    read_html,
    service_candidates,
    unfit,
)
from rollcast_envs.splits import SPLITS, split_of

PACKAGE = Package("orchard", "1.2", "0" * 64)
MODULE = '''
class Tree:
    def prune(self, height):
        """
        Cut the branches of the tree above a height.

        .. versionadded:: 1.1
           The unit of ``height``.

        The branches that grow above ``height`` are cut where they leave the stem, and :meth:`~orchard.Tree.burn`
        is given what was cut. A tree that is lower than the *height* stays as it is [1]_.

        Parameters
        ----------
        height : float
            Metres.
        """

    def water(self):
        """Water the tree.

        Do this when:

        - the soil is dry;
        - it is summer.
        """


add_newdoc("orchard.fast", "pick", ("ripe", "Pick the ripe apples.\\n\\nAn apple is ripe when it is red."))
'''
SERVICE: dict[str, Any] = {
    "operations": {
        "DeleteOrchard": {
            "documentation": "<p>Deletes an idle orchard with its trees. You can delete only an <code>IDLE</code> "
            "orchard .</p> <note> <p>All trees of the orchard are deleted with it, and cannot be brought back after "
            'the call returns.</p> </note> <p>For more information, see <a href="x">Orchards</a>.</p>'
        },
        "ListOrchards": {"documentation": "<p>Lists the orchards.</p> <ul> <li> <p>All of them.</p> </li> </ul>"},
        "OldOrchard": {"documentation": "<p>Lists old orchards. They are old.</p>", "deprecated": True},
        "Undocumented": {},
    }
}


def samples() -> list[Candidate]:
    return [*module_candidates(PACKAGE, "orchard/trees/__init__.py", MODULE), *service_candidates("farm", SERVICE)]


@cache
def shipped() -> tuple[dict[str, Any], ...]:
    lines = (files("rollcast_envs.data.summarization") / "records.jsonl").read_text(encoding="utf-8").splitlines()
    return tuple(json.loads(line) for line in lines)


def test_sources_become_candidates() -> None:
    prune, ripe, delete = samples()
    assert prune == Candidate(
        kind="docstring",
        group="orchard.trees",
        source="orchard/1.2 orchard.trees.Tree.prune",
        name="Tree.prune",
        text="The branches that grow above height are cut where they leave the stem, and burn is given what was cut. "
        "A tree that is lower than the height stays as it is [1].",
        summary="Cut the branches of the tree above a height.",
    )
    assert (ripe.name, ripe.summary, ripe.text) == (
        "pick.ripe",
        "Pick the ripe apples.",
        "An apple is ripe when it is red.",
    )
    assert delete.source == f"botocore/{BOTOCORE.version} farm.DeleteOrchard" and delete.group == "botocore/farm"
    assert delete.summary == "Deletes an idle orchard with its trees."
    assert delete.text.startswith("You can delete only an IDLE orchard. All trees") and delete.text.endswith("returns.")


def test_fit_candidates_become_records() -> None:
    prune, _, delete = samples()
    records = build_records(samples())
    assert {record["source"] for record in records} == {prune.source, delete.source}
    (record,) = [record for record in records if record["kind"] == "docstring"]
    assert record == {
        "id": f"summarization:{hashlib.sha256(prune.document.encode()).hexdigest()[:12]}",
        "group": "orchard.trees",
        "source": "orchard/1.2 orchard.trees.Tree.prune",
        "document": f"Tree.prune. {prune.text}",
        "references": ["Cut the branches of the tree above a height."],
        "kind": "docstring",
    }


def test_the_same_candidates_give_the_same_bytes_in_any_order() -> None:
    shuffled = samples() * 2
    Random(1).shuffle(shuffled)
    assert to_lines(build_records(shuffled)) == to_lines(build_records(samples()))


def test_near_duplicates_and_what_exceeds_the_limit_of_a_service_are_left_out() -> None:
    *_, delete = samples()
    twin = replace(delete, group="botocore/garden", text=delete.text.replace("You can", "You may"))
    assert len(build_records([delete, twin])) == 1
    assert len(build_records([delete, replace(twin, summary="Removes one idle orchard with all of its trees.")])) == 1
    draw = Random(2)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=7)) for _ in range(30 * (OPERATIONS + 5))]
    many = [
        replace(delete, text=f"{' '.join(part)}.", summary=f"{' '.join(part[:4]).capitalize()}.")
        for part in (words[i : i + 30] for i in range(0, len(words), 30))
    ]
    assert len(build_records(many)) == OPERATIONS


@pytest.mark.parametrize(
    "description",
    [
        "Solve it.\n\nLet :math:`x` be\n\n.. math:: x = 1",
        "Solve it.\n\nFor example::\n\n    solve(x)",
        "Solve it.\n\nCases:\n\n1. The first.\n2. The second.",
        "Solve it.\n\n>>> solve(1)\n1",
        "Solve\n\nNo full stop above.",
        "",
    ],
)
def test_descriptions_that_are_not_plain_prose_are_refused(description: str) -> None:
    assert read_docstring(description) is None


def test_markup_comes_off() -> None:
    text = "Go. A ``b`` and `c`, `docs <https://x>`_, **bold**, :func:`go`, :ref:`a page <page>`; it ’is’."
    assert read_docstring(text) == ("Go.", "A b and c, docs, bold, go, a page; it 'is'.")
    assert read_docstring(
        "Go.\n\nFar.\n\nExplanation\n===========\n\nOn foot, e.g. in May.\n\nNotes\n=====\n\nNo."
    ) == (
        "Go.",
        "Far. On foot, e.g. in May.",
    )
    assert read_html("<p>Stops &amp; waits. It\nwaits .</p><p>See the guide.</p>") == ("Stops & waits.", "It waits.")


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"summary": "Cut branches."}, "length of the summary"),
        ({"text": "The branches of the tree above a height."}, "length of the document"),
        ({"summary": "Cut the branches. Then burn the tree above."}, "summary is not one sentence"),
        ({"summary": "This cuts the branches of the tree."}, "summary speaks of the text, the reader or the service"),
        ({"summary": "Cut the branches above $height."}, "markup, formulas or listings"),
        ({"summary": "Prune the tree.", "name": "prune_tree"}, "summary spells out the name"),
        ({"summary": "Saw the twigs of the bush above a height."}, "summary says what the document does not"),
    ],
)
def test_unfit_candidates_are_told_why(changed: dict[str, str], reason: str) -> None:
    prune, *_ = samples()
    assert unfit(prune) == "" and unfit(replace(prune, **changed)) == reason


def test_names_and_numbers_of_a_summary_stand_in_the_document() -> None:
    prune, *_ = samples()
    assert not derivable(replace(prune, summary="Cut the branches of the tree above a height in Kent."))
    assert not derivable(replace(prune, summary="Cut the branches of the tree above a height of 5."))
    assert derivable(replace(prune, summary="Cut the branches of the Tree above a height."))


def test_shipped_records_are_whole() -> None:
    records = shipped()
    text = (files("rollcast_envs.data.summarization") / "records.jsonl").read_text(encoding="utf-8")
    assert len(records) >= 1500 and len(text.encode()) <= 2_000_000
    assert to_lines(records) == text == unicodedata.normalize("NFC", text)
    assert len({record["id"] for record in records}) == len(records)
    assert [record["id"] for record in records] == sorted(record["id"] for record in records)
    for record in records:
        (summary,) = record["references"]
        assert len(record["document"].split()) in DOCUMENT_WORDS and len(summary.split()) in SUMMARY_WORDS


def test_shipped_splits_share_no_group_and_no_text() -> None:
    sizes = Counter(split_of(record["group"]) for record in shipped())
    assert sizes["validation"] >= 120 and sizes["test"] >= 120 and sizes["train"] >= 1200
    for field in ("document", "references"):
        texts = {split: [str(r[field]) for r in shipped() if split_of(r["group"]) == split] for split in SPLITS}
        assert likeness(texts["train"], texts["validation"] + texts["test"]).max() < ALIKE
        assert likeness(texts["validation"], texts["test"]).max() < ALIKE
    assert len(without_leaks(shipped(), lambda record: record["document"])) == len(shipped())


def test_the_provenance_file_tells_digests_licences_and_counts() -> None:
    folder = files("rollcast_envs.data.summarization")
    told = (folder / "SOURCE.md").read_text(encoding="utf-8")
    assert hashlib.sha256((folder / "records.jsonl").read_bytes()).hexdigest() in told
    for package in (*PYTHON_PACKAGES, BOTOCORE):
        assert package.sha256 in told
        mine = [record for record in shipped() if record["source"].startswith(f"{package.name}/{package.version} ")]
        splits = Counter(split_of(record["group"]) for record in mine)
        figures = " | ".join(str(number) for number in (len(mine), *(splits[split] for split in SPLITS)))
        assert f"| {package.name} | {figures} |" in told
