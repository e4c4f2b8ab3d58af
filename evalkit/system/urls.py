"""Detect URLs, show them without secrets, and check whether the network may be used."""

from __future__ import annotations

import os
import re

__all__ = ["after_host", "is_offline", "is_url", "scheme_of", "scrubbed", "shown", "without_query"]

# At least two letters, because of C:// on Windows; also the :: of fsspec's chained URLs, which are refused.
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.:-]+)://")
_IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://[^\s\"<>]+")


def is_offline() -> bool:
    """Whether ``EVALKIT_OFFLINE`` forbids using the network."""
    return os.environ.get("EVALKIT_OFFLINE", "0") not in ("", "0")


def is_url(source: object) -> bool:
    """Whether it is a URL and not an existing path. A :class:`~pathlib.Path` is never a URL."""
    return isinstance(source, str) and bool(_URL.match(source)) and not os.path.lexists(source)


def scheme_of(url: str) -> str:
    """The part before ``://``, in lower case."""
    return url.partition("://")[0].lower()


def without_query(url: str) -> str:
    """An HTTP URL without query and fragment; any other URL unchanged."""
    return re.split(r"[?#]", url, maxsplit=1)[0] if scheme_of(url) in ("http", "https") else url


def after_host(url: str) -> str:
    """The part after the host, which may be an IPv6 address in brackets."""
    return url.partition("://")[2].partition("/")[2]


def shown(text: str) -> str:
    """A URL without user, password and query; any other text unchanged."""
    if not _URL.match(text):
        return text
    scheme, _, rest = text.partition("://")
    is_web = scheme.lower() in ("http", "https")
    hidden = f"{scheme}://..."  # if it is unclear which part is secret
    if is_web:
        whole, rest = rest, re.split(r"[?#]", rest, maxsplit=1)[0]
        if "@" in whole and "@" not in rest:  # a user or password with ? or #
            return hidden
    host, slash, path = rest.partition("/")
    if is_web and ":" in host and "@" in path:  # a password with a slash
        return hidden
    host = host.rpartition("@")[2]
    port = host.rpartition(":")[2] if ":" in host and not host.endswith("]") else "0"
    return f"{scheme}://{host}{slash}{path}" if port.isdecimal() else hidden


def scrubbed(text: str) -> str:
    """The text with every URL replaced by :func:`shown`."""
    return _IN_TEXT.sub(lambda match: shown(match[0]), text)
