"""Is this text a URL, and how is it shown without what may be secret?"""

from __future__ import annotations

import re

__all__ = ["is_url", "scheme_of", "scrubbed", "shown"]

# Two letters at least, as Windows has C://; and the :: of fsspec's chains, which are refused.
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.:-]+)://")
_IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://[^\s'\"<>]+")


def is_url(source: object) -> bool:
    """Whether it is a URL and not a path. No URL is a :class:`~pathlib.Path`."""
    return isinstance(source, str) and bool(_URL.match(source))


def scheme_of(url: str) -> str:
    """What precedes ``://``, in small letters."""
    return url.partition("://")[0].lower()


def shown(text: str) -> str:
    """A URL without user, password and query; any other text as it is."""
    if not is_url(text):
        return text
    scheme, _, rest = text.partition("://")
    if scheme.lower() in ("http", "https"):
        rest = re.split(r"[?#]", rest, maxsplit=1)[0]
    host, slash, path = rest.partition("/")
    host = host.rpartition("@")[2]
    port = host.rpartition(":")[2] if ":" in host and not host.endswith("]") else "0"
    if not port.isdecimal():  # a password with a slash in it
        return f"{scheme}://..."
    return f"{scheme}://{host}{slash}{path}"


def scrubbed(text: str) -> str:
    """A text in which all URLs are :func:`shown`."""
    return _IN_TEXT.sub(lambda match: shown(match[0]), text)
