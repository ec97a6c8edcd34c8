"""[feedback]: what is kept of the live policy's answers and of what people say of them.

Owns: the settings and their bounds. Does not know the database (`rollcast.live`).
"""

from typing import Annotated

from pydantic import Field

from rollcast.section import NotNegative, Section, ZeroOrMore


class FeedbackSection(Section):
    """What is kept of the answers of the live policy, and of what people say of them."""

    enabled: bool = True
    """Whether answers are kept, so that feedback on them can be taken; without it `/v1/feedback` is refused."""
    url: Annotated[str, Field(min_length=1)] | None = None
    """Database to keep it in (`postgresql+psycopg://USER@HOST/NAME`); without it, feedback.sqlite in the run folder."""
    keep_days: ZeroOrMore = 90.0
    """Days after which an answer and its feedback are removed; 0 keeps them for ever."""
    max_mib: NotNegative = 1024
    """MiB of answers kept, beyond which the oldest go, those that nobody spoke of first; 0 sets no limit."""
