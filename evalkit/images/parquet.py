"""Parquet files of encoded images, as the Hugging Face hub ships them: one file, or a folder of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evalkit.errors import ImageError, InputError, MissingDependencyError, listing
from evalkit.images.files import ImageFiles, list_folder, walk_names
from evalkit.images.names import is_hidden, is_image, split_of, splits_note
from evalkit.images.reading import Candidate, check_size, readable
from evalkit.system.files import kind_of
from evalkit.system.storage import Place, Remote, listed, size_of

__all__ = ["Parquet"]

_SUFFIXES = {".parquet", ".pq"}


class Parquet(ImageFiles):
    """Rows of parquet files as the Hugging Face hub ships images: a column of ``{bytes, path}`` or bytes."""

    def __init__(self, path: Place) -> None:
        listed, notes = _list(path) if path.is_dir() else ({path.name: path}, ())
        files = [*listed.values()]
        self._path, self._files = path, files
        self._rows: list[int] = []
        labels: list[NDArray[np.int64]] = []
        problems: list[str] = []
        unused: set[str] = set()
        for file in files:
            with _parquet_file(file) as table:
                columns = table.schema_arrow.names
                self._column = _image_column(str(file), table.schema_arrow)
                self._rows.append(table.metadata.num_rows)
                unused |= {*columns} - {self._column, "label"}
                if "label" in columns:
                    column = table.read(["label"]).column("label")
                    if problem := _column_problem(column):
                        problems.append(problem)
                    else:
                        labels.append(column.to_numpy().astype(np.int64))
        names = [
            f"{file}/{row:08d}" for file, rows in zip(listed, self._rows, strict=True) for row in range(rows)
        ]
        if not names:
            raise InputError(f"{path}: its parquet files have no rows; expected at least one image")
        super().__init__(str(path), "parquet", names)
        self.reads_in_order = len(files) == 1
        self.notes += notes
        if sum(map(len, labels)) == len(names):
            self.labels = np.concatenate(labels)
        elif problems:
            self.leave_labels_out(f"The labels (column label) are left out: {problems[0]}.")
        elif labels:
            self.leave_labels_out(
                f"The labels are left out: {len(labels)} of {len(files)} files have a column label."
            )
        if unused:
            self.notes += (f"Columns of {path} that are not used: {listing(sorted(unused))}.",)
        splits: Counter[str] = Counter()
        for name, rows in zip(listed, self._rows, strict=True):
            splits[split_of(PurePosixPath(name).parts)] += rows
        if note := splits_note(str(path), splits, "rows"):
            self.notes += (note,)

    @classmethod
    def claims(cls, candidate: Candidate) -> bool:
        """Whether it is a parquet file, or a folder of them without image files."""
        return candidate.head.startswith(b"PAR1") or (
            candidate.is_folder and _is_folder_of_tables(candidate.path)
        )

    def paths(self) -> Sequence[Place]:
        """The parquet files; see :meth:`ImageFiles.paths`."""
        return [self._path] if isinstance(self._path, Remote) else self._files

    def _versions(self) -> Iterable[object]:
        if isinstance(self._path, Remote):
            return listed({str(file): file for file in self._files if isinstance(file, Remote)})
        return map(size_of, self._files)

    def read(self, indices: Iterable[int]) -> Generator[tuple[str, bytes | InputError], None, None]:
        """Yield the name and content of these rows; see :meth:`ImageFiles.read`."""
        wanted = iter(indices)
        index = next(wanted, None)
        first = 0
        for file, rows in zip(self._files, self._rows, strict=True):
            if index is not None and index < first + rows:
                for row, value in self._rows_of(file, first):
                    if row == index:
                        yield self.names[row], self._content(self.names[row], value)
                        if (index := next(wanted, None)) is None:
                            return
                        if index >= first + rows:
                            break
            first += rows

    def _rows_of(self, file: Place, first: int) -> Iterator[tuple[int, Any]]:
        with _parquet_file(file) as table:
            for batch in table.iter_batches(16, columns=[self._column]):
                yield from enumerate(batch.column(0), first)
                first += len(batch)

    def _content(self, name: str, value: Any) -> bytes | InputError:
        content = value.as_py()
        if isinstance(content, dict):
            content = content["bytes"]
        where = f"{self.name}, {name}"
        if content is None:
            return ImageError(f"{where}: has no bytes; files outside the parquet file are not read")
        try:
            check_size(where, len(content))
        except ImageError as error:
            return error
        return bytes(content)


def _is_folder_of_tables(folder: Place) -> bool:
    found = False
    names = map(PurePosixPath, folder.walk()) if isinstance(folder, Remote) else walk_names(folder)
    for name in names:
        if is_image(name):
            return False
        found |= _is_table(name)
    return found


def _list(folder: Place) -> tuple[dict[str, Place], tuple[str, ...]]:
    """The parquet files in a folder, by relative path and sorted by it, and notes on what else is in it."""
    listed: dict[str, Place]
    notes: tuple[str, ...] = ()
    if isinstance(folder, Remote):
        listed = {**folder.walk()}
    else:
        names, notes = list_folder(folder)
        listed = {name: folder / name for name in names}
    tables = sorted(name for name in listed if _is_table(PurePosixPath(name)))
    if others := listing(sorted({*listed} - {*tables})):
        notes += (f"Files that are not parquet are left out: {others}.",)
    return {name: listed[name] for name in tables}, notes


def _is_table(name: PurePosixPath) -> bool:
    return name.suffix.lower() in _SUFFIXES and not is_hidden(name)


@contextmanager
def _parquet_file(file: Place) -> Iterator[Any]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise MissingDependencyError(
            "Parquet files are read with pyarrow, which is not installed: pip install 'evalkit[parquet]'"
        ) from None
    try:
        # Opened here, because pyarrow takes no names that are not UTF-8.
        with readable(str(file)), file.open("rb") as stream:
            start = stream.read(64)
            stream.seek(0)
            with parquet.ParquetFile(stream) as table:
                yield table
    except ArrowException as error:
        what = "" if start.startswith(b"PAR1") else f": it is {kind_of(start)}"
        raise InputError(f"{file}: not a valid parquet file{what} ({error}); copy it again") from error


def _column_problem(column: Any) -> str | None:
    """Why a column is not one class for each row; None if it is."""
    from pyarrow import types

    if not types.is_integer(column.type):
        return f"expected integers, found {column.type}"
    if column.null_count:
        return f"{column.null_count:,} of {len(column):,} are null"
    if types.is_uint64(column.type) and len(column) and column.to_numpy().max() > np.iinfo(np.int64).max:
        return "the largest does not fit into a signed 64-bit integer"
    return None


def _image_column(name: str, schema: Any) -> str:
    """The only column of ``{bytes, path}`` or of bytes, or the one of them called ``image`` or ``img``."""
    from pyarrow import types

    found = [
        field.name
        for field in schema
        if types.is_binary(field.type)
        or types.is_large_binary(field.type)
        or (types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0)
    ]
    named = [column for column in found if column in ("image", "img")] or found
    if len(named) != 1:
        raise InputError(
            f"{name}: which column holds the images? Expected image, img or only one of encoded bytes; "
            f"found {', '.join(found) or 'none'} of the columns {', '.join(schema.names)}"
        )
    return str(named[0])
