"""How the verbs that tell something show it: tables on a terminal, plain columns in a pipe.

Owns: width, frames, and making other people's text harmless. Does not know what is shown.
"""

from datetime import datetime

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

PIPE_WIDTH = 160
"""Columns where no terminal says how many there are."""


def screen() -> Console:
    """Standard output. In a pipe it is plain, and as wide as a table needs."""
    found = Console(highlight=False, markup=False)
    return found if found.is_terminal else Console(highlight=False, markup=False, width=PIPE_WIDTH)


def table(console: Console, *columns: str, title: str | None = None, right: tuple[str, ...] = ()) -> Table:
    """An empty table; columns named in `right` hold numbers."""
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD if console.is_terminal else None)
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return made


def grid() -> Table:
    """Labels and what they say, without a frame."""
    made = Table.grid(padding=(0, 2))
    made.add_column(style="bold", no_wrap=True)
    made.add_column(overflow="fold")
    return made


def harmless(text: str) -> Text:
    """Text of a policy or an environment as one line: what would steer the terminal is spelt out."""
    return Text("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text))


def harmless_lines(text: str) -> Text:
    """The same with its line breaks and tabs left as they are."""
    return Text("".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text))


def moment(seconds: float) -> str:
    """Epoch seconds as local time."""
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")
