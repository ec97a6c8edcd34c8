"""Builds `records.jsonl` from the docstrings of seven packages and the operations that botocore describes.

    python -m rollcast_envs.data.summarization.build

Owns the reading of descriptions and the choice among them. The wheels are fetched with pip, checked against their
digests, and read as data: nothing of them is imported or run. The same wheels always give the same bytes. What is left
out, and why, is told in SOURCE.md.
"""

import ast
import gzip
import hashlib
import inspect
import json
import re
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rollcast_envs.data.building import ALIKE, download, likeness, to_lines
from rollcast_envs.splits import position, split_of

HERE = Path(__file__).parent
LINUX = [f"--platform=manylinux{tag}_x86_64" for tag in ("_2_28", "_2_27", "_2_24", "_2_17", "2014")]
WHEELS_ONLY = ("--python-version=3.11", "--only-binary=:all:", *LINUX)

DOCUMENT_WORDS = range(25, 121)
SUMMARY_WORDS = range(3, 21)
COVERED = 2 / 3
"""Part of the summary's content words that stand in the document."""
COVERED_BY_TEXT = 0.5
"""The same, not counting the name at the head of the document."""
GIVEN_AWAY = 0.8
"""Part of the summary's content words that the name may not reach: "DeleteLabel" says "Deletes a label." by itself."""
LETTERS = 0.95
"""Part of a document that is letters, spaces and common punctuation; formulas and listings have less."""
OPERATIONS = 15
"""Operations of one service."""

Record = dict[str, Any]


@dataclass(frozen=True)
class Package:
    """A pinned wheel."""

    name: str
    version: str
    sha256: str


PYTHON_PACKAGES = (
    Package("matplotlib", "3.11.2", "07d9b9fa60cd4c393692f50d0bb03123242ddf61c99bb0e95e75feb354e7c1a8"),
    Package("networkx", "3.6.1", "d47fbf302e7d9cbbb9e2555a0d267983d2aa476bac30e90dfbe5669bd57f3762"),
    Package("numpy", "2.4.6", "89cd468399cfd2504718f0ba50e410dca55a170b61a02ad92bb18c8a65186e93"),
    Package("pandas", "3.1.1", "4f1602f614bb83f443381dbcbb94c4ac764b2e50c8d6c965614c5cd83e328c47"),
    Package("scikit-learn", "1.9.1", "52a0703bbc07ad27f560fa63fa68e4c54dd735bfbbf65b4dd3c225dc7547b6df"),
    Package("scipy", "1.17.1", "43af8d1f3bea642559019edfe64e9b11192a8978efbd1539d7bc2aaa23d92de4"),
    Package("sympy", "1.14.0", "e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5"),
)
BOTOCORE = Package("botocore", "1.43.11", "0108b5604df5a26918936c845e1e761866ee9ea8d1c1f9358ed3c69afdc37436")

NOT_THEIRS = re.compile(
    r"/(tests?|testing|externals?|_external|_vendored|_lib|extern|_antlr|multipledispatch)/"
    r"|pandas/util/version/|pandas/io/clipboard/|numpy/_utils/_pep440|/conftest\.py"
)
"""Tests, and what other projects wrote and these packages carry under other licences."""
UNDERLINE = re.compile(r"([=\-~^])\1{2,}\s*")
CONTINUED = ("explanation", "description")
"""Sections that go on with the description: SymPy has them."""
VERSION_NOTE = re.compile(r"\.\. (versionadded|versionchanged|deprecated|seealso|index|_)")
NOT_PROSE = re.compile(
    r"\s|\.\. |:|>>>|.*::$|([-*+•#]|\(?[\dA-Za-z][.)])\s|(Args|Arguments|Parameters|Returns|Examples?|Usage)\s*:"
    r"|.*\n\s+\S|.*\n([-*•]|\d+[.)])\s|.*>>>",
    re.DOTALL,
)
LISTS = {"ul", "ol", "dl", "li", "table", "pre", "h1", "h2", "h3", "examples", "fullname"}
RESIDUE = re.compile(
    r"[\\$%{}|`~^<>]|::|https?:|\b_\b|\*\*|--|\w_\s|sphx_glr|(?<!\.)\.\.(?!\.)| \(\)"
    r"|\b(TODO|FIXME|XXX)\b|\b(an|and|at|by|for|from|in|of|or|see|the|to|with|Eq|Fig|Pg|Ref|Sec)\."
)
"""Marks that did not come off, formulas, and the gaps that an empty link leaves."""
ORDINARY = re.compile(r"[^\W\d_]|[\s.,;:'\"()-]")
SENTENCE_END = re.compile(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)(?<!etc\.)(?<!vs\.)(?<!cf\.)(?<!al\.)\s+(?=[A-Z\d\"'(\[])")
POINTER = re.compile(
    r"(For (more|further|additional|detailed|details|examples?|a list|a complete|the full|information|instructions)\b"
    r"|(Please )?(see|refer to|read|consult)\b|(To|You can) (learn|find|read|see) more\b)",
    re.IGNORECASE,
)
"""Sentences that send the reader elsewhere: without their link they say nothing."""
STATUS = re.compile(
    r"(This|These|Those|It|Its|You|We|If|When|For|In|After|Before|Note|Notes|See|Please|Amazon|AWS|There|Same|Like"
    r"|Also|Use|Used|To|Deprecated|Internal|Alias|Wrapper|Initialize self|Do not|End of support)\b"
)
"""How a first sentence opens that speaks of the text, the reader or the service, instead of what is documented."""
ARTICLE = re.compile(r"(The|An?) ")
"""An operation is summed up by a verb; one that opens so describes a parameter or a result."""

STOP_WORDS = """
    a an the of to in on at by for from with without and or nor not no is are was were be been being it its this that
    these those as if then than into onto over under between per via which who whom whose when where while whether
    there here can may might must should will would could do does did done have has had having such so also only very
    more most other another any all each every both some same one you your we our they their them he she i
"""
HUMPS = re.compile(r"(?<=[a-z\d])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
STEM = 5


@dataclass(frozen=True)
class Candidate:
    """A description, cut in two: its first sentence, and what follows."""

    kind: str
    group: str
    source: str
    name: str
    text: str
    summary: str

    @property
    def document(self) -> str:
        return f"{self.name}. {self.text}"


def main() -> None:
    with TemporaryDirectory() as folder:
        found = candidates(Path(folder))
    judged = Counter((one.kind, unfit(one)) for one in found)
    records = build_records(found)
    (HERE / "records.jsonl").write_text(to_lines(records), encoding="utf-8", newline="\n")
    for (kind, reason), number in sorted(judged.items()):
        print(f"{number:6} {kind}: {reason or 'fit'}")
    print(f"{len(records)} records: {Counter(split_of(record['group']) for record in records)}")


def candidates(folder: Path) -> list[Candidate]:
    """Every description in the pinned wheels that is plain prose."""
    found: list[Candidate] = []
    for package in PYTHON_PACKAGES:
        with fetch(folder, package) as archive:
            found += python_candidates(package, archive)
    with fetch(folder, BOTOCORE) as archive:
        found += botocore_candidates(archive)
    return found


def fetch(folder: Path, package: Package) -> zipfile.ZipFile:
    return zipfile.ZipFile(download(folder, f"{package.name}=={package.version}", package.sha256, *WHEELS_ONLY))


def build_records(found: Iterable[Candidate]) -> list[Record]:
    """The fit ones, no two of them alike in document or summary, with a limit for each service; sorted by id."""
    fit = sorted((to_record(one) for one in found if not unfit(one)), key=lambda record: position(record["id"]))
    different = distinct(distinct(fit, lambda record: record["references"][0]), lambda record: record["document"])
    return sorted(limited(different), key=lambda record: str(record["id"]))


def to_record(one: Candidate) -> Record:
    digest = hashlib.sha256(one.document.encode()).hexdigest()
    return {
        "id": f"summarization:{digest[:12]}",
        "group": one.group,
        "source": one.source,
        "document": one.document,
        "references": [one.summary],
        "kind": one.kind,
    }


def distinct(records: Sequence[Record], text_of: Callable[[Record], str]) -> list[Record]:
    """The records without those that are near-duplicates of an earlier one, whatever their splits."""
    if len(records) < 2:
        return list(records)
    half = len(records) // 2
    first = distinct(records[:half], text_of)
    best = likeness([text_of(r) for r in records[half:]], [text_of(r) for r in first]).tolist()
    return first + distinct([r for r, like in zip(records[half:], best, strict=True) if like < ALIKE], text_of)


def limited(records: Iterable[Record]) -> Iterator[Record]:
    """The first `OPERATIONS` of each service, and all docstrings."""
    taken: Counter[str] = Counter()
    for record in records:
        taken[record["group"]] += 1
        if record["kind"] != "operation" or taken[record["group"]] <= OPERATIONS:
            yield record


# Python packages


def python_candidates(package: Package, archive: zipfile.ZipFile) -> Iterator[Candidate]:
    for path in sorted(archive.namelist()):
        if path.endswith(".py") and not NOT_THEIRS.search(f"/{path}"):
            yield from module_candidates(package, path, archive.read(path).decode("utf-8"))


def module_candidates(package: Package, path: str, code: str) -> Iterator[Candidate]:
    """One for each documented function and class of a module, given as its source text."""
    module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    for name, docstring in docstrings(ast.parse(code)):
        read = read_docstring(docstring)
        if read:
            source = f"{package.name}/{package.version} {module}.{name}"
            yield Candidate("docstring", module, source, name, text=read[1], summary=read[0])


def docstrings(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Qualified names and docstrings, those that NumPy adds to its compiled functions among them."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = f"{prefix}{child.name}"
            yield name, ast.get_docstring(child, clean=False) or ""
            yield from docstrings(child, f"{name}.")
        elif isinstance(child, ast.If | ast.Try | ast.With):
            yield from docstrings(child, prefix)
        elif isinstance(child, ast.Expr) and isinstance(child.value, ast.Call):
            yield from added_docstring(child.value)


def added_docstring(call: ast.Call) -> Iterator[tuple[str, str]]:
    """What `add_newdoc(module, name, docstring)` or `add_newdoc(module, name, (method, docstring))` documents."""
    if isinstance(call.func, ast.Name) and call.func.id == "add_newdoc":
        match [constants(argument) for argument in call.args]:
            case [[_], [name], [docstring]]:
                yield name, docstring
            case [[_], [name], [method, docstring]]:
                yield f"{name}.{method}", docstring


def constants(node: ast.expr) -> list[str]:
    parts = node.elts if isinstance(node, ast.Tuple) else [node]
    return [part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]


def read_docstring(docstring: str) -> tuple[str, str] | None:
    """The first sentence and the prose after it; None where the description holds code, lists, mathematics or notes."""
    prose: list[str] = []
    in_version_note = False
    for paragraph in paragraphs(description(inspect.cleandoc(docstring))):
        if VERSION_NOTE.match(paragraph):
            in_version_note = True
        elif NOT_PROSE.match(paragraph):
            if not (in_version_note and paragraph[0].isspace()):
                return None
        else:
            in_version_note = False
            prose.append(without_roles(paragraph))
    return first_and_rest(prose)


def description(docstring: str) -> str:
    """What stands before the first underlined title, and below those titles that go on with it."""
    lines = docstring.splitlines()
    kept: list[str] = []
    wanted = True
    for line, after in zip(lines, [*lines[1:], ""], strict=False):
        if line.strip() and UNDERLINE.fullmatch(after):
            wanted = line.strip().casefold() in CONTINUED
            kept.append("")
        elif wanted and not UNDERLINE.fullmatch(line):
            kept.append(line)
    return "\n".join(kept)


def paragraphs(text: str) -> list[str]:
    return [part.strip("\n").rstrip() for part in re.split(r"\n\s*\n", text) if part.strip()]


def without_roles(paragraph: str) -> str:
    """The words of a paragraph of reStructuredText, without its marks."""
    text = re.sub(r":[a-z:]+:`([^`<]+?)\s+<[^`>]*>`", r"\1", paragraph)
    text = re.sub(r":(?!math:)[a-z:]+:`~(?:[^`]*\.)?([^`.]+)`", r"\1", text)
    text = re.sub(r":(?!math:)[a-z:]+:`!?([^`]+)`", r"\1", text)
    text = re.sub(r"(?<!`)`([^`<]+?)\s*<[^`>]*>`_+", r"\1", text)
    text = re.sub(r"(?<!:)(`{1,2})([^`]+)\1_{0,2}", r"\2", text)
    text = re.sub(r"(\[[\w#]+\])_", r"\1", text)
    return re.sub(r"(?<![\w*])(\*{1,2})([^*\s][^*]*?)\1(?![\w*])", r"\2", text)


# botocore


def botocore_candidates(archive: zipfile.ZipFile) -> Iterator[Candidate]:
    """From the newest version of each service's description."""
    newest = {path.split("/")[2]: path for path in sorted(archive.namelist()) if path.endswith("/service-2.json.gz")}
    for service, path in newest.items():
        yield from service_candidates(service, json.loads(gzip.decompress(archive.read(path))))


def service_candidates(service: str, described: Record) -> Iterator[Candidate]:
    """One for each documented operation of a service that is not deprecated."""
    for name, operation in sorted(described["operations"].items()):
        read = read_html(operation.get("documentation", ""))
        if read and not operation.get("deprecated"):
            source = f"{BOTOCORE.name}/{BOTOCORE.version} {service}.{name}"
            yield Candidate("operation", f"botocore/{service}", source, name, text=read[1], summary=read[0])


def read_html(documentation: str) -> tuple[str, str] | None:
    """The first sentence and the prose after it; None where there are lists, tables or listings."""
    page = _Page()
    page.feed(documentation)
    page.close()
    if page.tags & LISTS:
        return None
    return first_and_rest(paragraphs("".join(page.parts)))


class _Page(HTMLParser):
    """Text with a blank line between paragraphs, and the tags that were met."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)
        if tag in ("p", "br", "note", "important"):
            self.parts.append("\n\n")

    def handle_data(self, data: str) -> None:
        self.parts.append(data.replace("\n", " "))


# Choice


def first_and_rest(prose: Sequence[str]) -> tuple[str, str] | None:
    """The first sentence, and those after it but for pointers to other pages; None unless the paragraphs are whole."""
    whole = [tidy(paragraph) for paragraph in prose]
    if not whole or not all(paragraph.endswith((".", "!", "?", '."', ".)")) for paragraph in whole):
        return None
    first, *rest = [sentence for paragraph in whole for sentence in SENTENCE_END.split(paragraph)]
    return first, " ".join(sentence for sentence in rest if not POINTER.match(sentence))


def tidy(text: str) -> str:
    """NFC, straight quotes, single spaces, and no space before punctuation."""
    straight = unicodedata.normalize("NFC", text).translate(str.maketrans("‘’“”\u00a0", "''\"\" "))
    return re.sub(r"\s+([.,;:)])(?=\s|$)", r"\1", " ".join(straight.split()))


def unfit(one: Candidate) -> str:
    """Why the candidate cannot teach to sum up; empty if it can."""
    both = f"{one.document} {one.summary}"
    if len(one.summary.split()) not in SUMMARY_WORDS:
        return "length of the summary"
    if len(one.document.split()) not in DOCUMENT_WORDS:
        return "length of the document"
    if re.search(r"[.!?:;]\s|\.\.", one.summary) or not one.summary.endswith(".") or not one.summary[0].isupper():
        return "summary is not one sentence"
    if STATUS.match(one.summary) or (one.kind == "operation" and ARTICLE.match(one.summary)):
        return "summary speaks of the text, the reader or the service"
    if RESIDUE.search(both) or len(ORDINARY.findall(one.text)) < LETTERS * len(one.text):
        return "markup, formulas or listings"
    if len(stems(one.summary) & stems(one.name)) >= GIVEN_AWAY * len(stems(one.summary)):
        return "summary spells out the name"
    if not derivable(one):
        return "summary says what the document does not"
    return ""


def derivable(one: Candidate) -> bool:
    """True if most content words of the summary, and all of its names and numbers, stand in the document."""
    said = stems(one.summary)
    by_text = said & stems(one.text)
    by_both = said & (stems(one.text) | stems(one.name))
    if not said or len(by_both) < COVERED * len(said) or len(by_text) < COVERED_BY_TEXT * len(said):
        return False
    known = f"{one.name} {one.text}".casefold()
    return all(name.casefold() in known for name in names(one.summary))


def stems(text: str) -> set[str]:
    """The first letters of each content word; parts of an identifier are words."""
    stop_words = set(STOP_WORDS.split())
    words = re.findall(r"[^\W_]+", HUMPS.sub(" ", text))
    return {word.casefold()[:STEM] for word in words if word.casefold() not in stop_words}


def names(summary: str) -> list[str]:
    """Words that cannot be guessed: with a capital letter after the first word, a digit or an underscore."""
    first, *rest = re.findall(r"\w+", summary)
    return [word for word in rest if re.search(r"[A-Z\d_]", word)] + re.findall(r"\w*[\d_]\w*|\w+[A-Z]\w*", first)


if __name__ == "__main__":
    main()
