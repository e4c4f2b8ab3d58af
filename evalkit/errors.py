"""The errors that evalkit raises on purpose.

::

    EvalkitError                  anything a user can act on
    ├── InputError                a file or array is not what it is said to be
    │   └── ImageError            one image of a batch is bad; the message names it
    ├── DownloadError             a file could not be fetched: no connection, not there, not the file
    ├── WeightsError              Inception weights are missing, damaged or not the published ones
    ├── FeatureError              features of another extractor, or of another size, were mixed
    ├── UndefinedMetricError      the metric has no value for this input (for example one image)
    ├── OutputError               a result cannot be written: no permission, no space
    ├── WorkerError               another process of the same job died, failed or hangs
    └── MissingDependencyError    an optional package is not installed

Every message says what was given, what was expected and what to do. The command line prints it
as one line and exits with 2; anything else that escapes is a bug and shows its traceback.
"""

__all__ = [
    "DownloadError",
    "EvalkitError",
    "FeatureError",
    "ImageError",
    "InputError",
    "MissingDependencyError",
    "OutputError",
    "UndefinedMetricError",
    "WeightsError",
    "WorkerError",
]


class EvalkitError(Exception):
    """Base of every error that evalkit raises on purpose."""


class InputError(EvalkitError):
    """A file or array is not what it is said to be."""


class ImageError(InputError):
    """One image of a batch is bad: corrupt, of another size, out of range."""


class DownloadError(EvalkitError):
    """A file could not be fetched from any of its addresses."""


class WeightsError(EvalkitError):
    """Inception weights are missing, damaged or not the published ones."""


class FeatureError(EvalkitError):
    """Features of different extractors or of wrong sizes were mixed."""


class UndefinedMetricError(EvalkitError):
    """The metric has no value for this input; it is never reported as a number."""


class OutputError(EvalkitError):
    """A result cannot be written."""


class WorkerError(EvalkitError):
    """Another process of a job that torchrun started died, failed or makes no progress."""


class MissingDependencyError(EvalkitError):
    """An optional package that the requested feature needs is not installed."""
