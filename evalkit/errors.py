"""The errors that evalkit raises on purpose.

::

    EvalkitError                  anything a user can act on
    ├── InputError                a file or array is not what it is said to be
    │   ├── ImageError            one image of a batch is bad; the message names it
    │   └── RemoteError           a URL cannot be read: not there, no permission, no connection
    ├── DownloadError             a file could not be fetched: no connection, not there, not the file
    ├── WeightsError              weights of a network are missing, damaged or not the expected ones
    ├── FeatureError              features of another extractor, or of another size, were mixed
    ├── UndefinedMetricError      the metric has no value for this input (for example one image)
    ├── OutputError               a result cannot be written: no permission, no space
    ├── WorkerError               a worker died, failed or hangs
    └── MissingDependencyError    an optional package is not installed

Every message says what was given, what was expected and what to do. The command line prints it
as one line and exits with 2; anything else that escapes is a bug and shows its traceback.
"""

from collections.abc import Iterable

__all__ = [
    "DownloadError",
    "EvalkitError",
    "FeatureError",
    "ImageError",
    "InputError",
    "MissingDependencyError",
    "OutputError",
    "RemoteError",
    "UndefinedMetricError",
    "WeightsError",
    "WorkerError",
    "brief",
    "did_you_mean",
    "first_line",
    "listing",
    "nearest",
    "shortened",
]

MOST_CHARACTERS = 900
MOST_LISTED = 8


def brief(text: object, most: int = 60) -> str:
    """A name out of a file, for a message: on one line, and cut where it is long."""
    shown = str(text)
    if not shown.isprintable():
        shown = repr(shown)[1:-1]
    return shown if len(shown) <= most else f"{shown[:most]}..."


def nearest(given: object, known: Iterable[str], cutoff: float = 0.6) -> list[str]:
    """The known names that someone who wrote ``given`` may have meant: at most three, the nearest first.

    Args:
        given: What was written. Upper and lower case count as the same.
        known: Names. Those of about the same spelling count; where there are none, those that begin with it.
        cutoff: How alike two spellings must be, from 0 to 1: the ratio of :mod:`difflib`.
    """
    import difflib  # only where something is wrong

    by_spelling = {name.casefold(): name for name in known}
    spelling = str(given).strip().casefold()[:100]
    found = difflib.get_close_matches(spelling, by_spelling, n=3, cutoff=cutoff)
    if not found and len(spelling) > 1:
        found = [name for name in by_spelling if name.startswith(spelling)][:3]
    return [by_spelling[name] for name in found]


def did_you_mean(given: object, known: Iterable[str]) -> str:
    """`` Did you mean fid or kid?``, for the end of a message; empty where no known name is near."""
    found = nearest(given, known)
    return f" Did you mean {' or '.join(found)}?" if found else ""


def first_line(error: BaseException) -> str:
    """The first line of a library's message; empty where it has none."""
    return str(error).partition("\n")[0]


def listing(items: Iterable[object], most: int = MOST_LISTED) -> str:
    """The first items, each :func:`brief`, and how many more there are: ``a, b, c and 5 more``."""
    texts = [brief(item, 80) for item in items]
    more = f" and {len(texts) - most:,} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more


def shortened(text: str, most: int = MOST_CHARACTERS) -> str:
    """The text, or its beginning and end where it has more than ``most`` characters."""
    if len(text) <= most:
        return text
    half = (most - 7) // 2
    return f"{text[:half]} [...] {text[-half:]}"


class EvalkitError(Exception):
    """Base of every error that evalkit raises on purpose.

    A message of over 900 characters is cut in the middle: names and values in it may come from a file.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(shortened(str(message)))


class InputError(EvalkitError):
    """A file or array is not what it is said to be."""


class ImageError(InputError):
    """One image of a batch is bad: corrupt, of another size, out of range."""


class RemoteError(InputError):
    """A URL cannot be read: nothing is there, no permission, no connection."""


class DownloadError(EvalkitError):
    """A file could not be fetched from any of its addresses."""


class WeightsError(EvalkitError):
    """Weights of a network are missing, damaged or not the expected ones."""


class FeatureError(EvalkitError):
    """Features of different extractors or of wrong sizes were mixed."""


class UndefinedMetricError(EvalkitError):
    """The metric has no value for this input; it is never reported as a number."""


class OutputError(EvalkitError):
    """A result cannot be written."""


class WorkerError(EvalkitError):
    """A worker died, failed or makes no progress, or differs from the process that gives it work."""


class MissingDependencyError(EvalkitError):
    """An optional package that the requested feature needs is not installed."""
