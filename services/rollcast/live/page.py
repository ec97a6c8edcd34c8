"""`/`: the page on which the live policy can be tried in a browser.

Owns: how the page is sent. Its content is `page.html`, one file without a bundler; it speaks to the same routes as any
client. Does not know what they do.

The page may run its own script and style and nothing else, and talk to the server that sent it and to no other: what a
policy says is put in as text, and could do nothing even if it were not.
"""

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files


@cache
def page() -> tuple[bytes, dict[str, str]]:
    """The page and its headers."""
    content = (files("rollcast.live") / "page.html").read_bytes()
    policy = {
        "default-src": "'none'",
        "script-src": _digest(content, b"script"),
        "style-src": _digest(content, b"style"),
        "img-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return content, {
        "content-type": "text/html; charset=utf-8",
        "content-security-policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
        "cache-control": "no-cache",
    }


def _digest(content: bytes, element: bytes) -> str:
    """The one inline script or style of the page, as a Content-Security-Policy names it."""
    (inside,) = re.findall(rb"<%s>(.*?)</%s>" % (element, element), content, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(inside).digest()).decode()}'"
