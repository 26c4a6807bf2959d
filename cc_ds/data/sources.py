"""Open what a user calls a data source and walk its records, each with a name a person can look up.

A source is a file (.json, .jsonl, .csv, .parquet, .arrow), a folder that `save_to_disk` wrote, or the name of a
Hugging Face data set, as name, name:config, name:config:split or name::split. `open_source` looks at the first bytes
before it believes a file's name, and returns a `Source`: its columns, its records (one pass, never the whole file in
memory except for .json), and a digest of its content for caches. Every error is a ValueError that names the file, the
line or row, and what to do.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = tuple[int, dict[str, Any]]  # (1-based line for jsonl, 1-based row elsewhere; the columns by name)

READERS = {
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
COLUMN_PROBE = 100  # records without a schema (json, jsonl): columns are those of the first 100
MAGIC = {
    b"PAR1": "a parquet file: rename it to .parquet",
    b"ARROW1": "an Arrow file: rename it to .arrow",
    b"\x1f\x8b": "gzip-compressed: unpack it first (gunzip)",
    b"(\xb5/\xfd": "zstd-compressed: unpack it first (unzstd)",
    b"PK\x03\x04": "a zip archive (or a spreadsheet): unpack it, or export it as .csv",
    b"\xff\xfe": "UTF-16 text: convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)",
    b"\xfe\xff": "UTF-16 text: convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)",
}
MAGIC_OF_KIND = {"parquet": b"PAR1", "arrow": b"ARROW1"}


@dataclass(frozen=True)
class Source:
    """One opened data source: `records()` starts a fresh pass over (number, record)."""

    name: str
    columns: list[str]
    records: Callable[[], Iterator[Record]]
    digest: str
    """Hex digest of the content, for cache keys."""


def open_source(path: str | Path, split: str | Sequence[str] = "train") -> Source:
    """Open a file, a `save_to_disk` folder or a `datasets` name.

    Of a data set with splits, `split` is read, or of several the first that it has; a name's own split goes before.
    Raises ValueError (naming the file and the remedy) for a missing, unreadable, empty or misnamed source.
    """
    name, file = str(path), Path(path).expanduser()
    splits = [split] if isinstance(split, str) else list(split)
    if file.is_dir():
        return _source_of_dataset(name, _load_folder(file, splits), digest_of_folder(file))
    if not file.exists():
        if file.suffix in READERS or file.is_absolute() or name.startswith((".", "~")):
            raise ValueError(f"{name}: no such file or folder. Check the path (working directory: {Path.cwd()}).")
        dataset = _load_by_name(name, splits)
        return _source_of_dataset(name, dataset, hashlib.sha256(str(dataset._fingerprint).encode()).hexdigest())
    kind = READERS.get(file.suffix.lower())
    if kind is None:
        raise ValueError(f"{name}: unknown data format {file.suffix!r}. Use one of {', '.join(READERS)}.")
    _check_looks_like(kind, name, file)
    if kind == "parquet":
        return _source_of_parquet(name, file)
    if kind == "arrow":
        return _source_of_arrow(name, file)
    reader = {"json": _read_json, "jsonl": _read_jsonl, "csv": _read_csv}[kind]
    probe = [record for _, record in itertools.islice(reader(name, file), COLUMN_PROBE)]
    if not probe:
        raise ValueError(f"{name}: holds no rows.")
    columns = list(dict.fromkeys(str(key) for record in probe for key in record))
    return Source(name, columns, lambda: reader(name, file), digest_of_file(file))


def digest_of_file(file: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def digest_of_folder(folder: Path) -> str:
    """SHA-256 over the names and digests of all files below a folder, in hex; the order of listing does not matter."""
    parts = [
        f"{file.relative_to(folder)} {digest_of_file(file)}" for file in sorted(folder.rglob("*")) if file.is_file()
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _check_looks_like(kind: str, name: str, file: Path) -> None:
    """Refuse a file whose first bytes belong to another format than its name says."""
    with open(file, "rb") as stream:
        head = stream.read(4096)
    if not head.removeprefix(b"\xef\xbb\xbf").strip():
        raise ValueError(f"{name}: is empty.")
    for magic, remedy in MAGIC.items():
        if head.startswith(magic) and magic != MAGIC_OF_KIND.get(kind):
            raise ValueError(f"{name}, line 1: not {kind} but {remedy}.")
    first = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if kind in ("csv", "parquet", "arrow") and first in (b"{", b"["):
        remedy = "json: rename it to .json" if first == b"[" else "JSON lines: rename it to .jsonl"
        raise ValueError(f"{name}, line 1: not {kind} but looks like {remedy}.")
    if kind == "jsonl" and first == b"[":
        raise ValueError(f"{name}, line 1: one JSON list, not one JSON object a line: rename it to .json.")


def _read_utf8(name: str, blob: bytes, line: int) -> str:
    try:
        return blob.decode("utf-8")
    except UnicodeDecodeError as error:
        line += blob[: error.start].count(b"\n")
        bad = blob[error.start]
        raise ValueError(
            f"{name}, line {line}: byte 0x{bad:02x} is not UTF-8. Convert the file to UTF-8 (iconv)."
        ) from None


def _read_json(name: str, file: Path) -> Iterator[Record]:
    text = _read_utf8(name, file.read_bytes().removeprefix(b"\xef\xbb\xbf"), line=1)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip()[:1] == "{":
            raise ValueError(
                f"{name}, line {error.lineno}: a second JSON value starts here, so this looks like JSON lines: "
                "rename it to .jsonl."
            ) from None
        raise ValueError(
            f"{name}, line {error.lineno}, column {error.colno}: broken JSON ({error.msg}). Mend that line."
        ) from None
    if isinstance(content, dict):
        if not isinstance(content.get("data"), list):
            raise ValueError(
                f'{name}: a JSON object with keys {sorted(content)}; expected a list of objects, or {{"data": [...]}}. '
                "One object a line is .jsonl."
            )
        content = content["data"]
    if not isinstance(content, list):
        raise ValueError(f"{name}: holds one {type(content).__name__}; expected a list of objects.")
    for number, record in enumerate(content, start=1):
        if not isinstance(record, dict):
            raise ValueError(f"{name}, row {number}: a {type(record).__name__}, not an object with named columns.")
        yield number, record


def _read_jsonl(name: str, file: Path) -> Iterator[Record]:
    with open(file, "rb") as stream:
        for number, blob in enumerate(stream, start=1):
            if number == 1:
                blob = blob.removeprefix(b"\xef\xbb\xbf")
            if not blob.strip():
                continue
            try:
                record = json.loads(_read_utf8(name, blob, number))
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{name}, line {number}, column {error.colno}: broken JSON ({error.msg}). Every line of a .jsonl "
                    "file is one whole JSON object: mend or remove this line (one object over several lines is .json)."
                ) from None
            if not isinstance(record, dict):
                raise ValueError(f"{name}, line {number}: a {type(record).__name__}, not an object with named columns.")
            yield number, record


def _read_csv(name: str, file: Path) -> Iterator[Record]:
    def lines() -> Iterator[str]:
        with open(file, "rb") as stream:
            for number, blob in enumerate(stream, start=1):
                yield _read_utf8(name, blob.removeprefix(b"\xef\xbb\xbf") if number == 1 else blob, number)

    # Long texts exceed the module's default of 128 KiB a field; the limit is global to the csv module.
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(lines(), strict=True)
    try:
        header = next(reader)
        if len(set(header)) != len(header):
            raise ValueError(f"{name}, line 1: a column name stands twice in the header {header}. Rename one.")
        for number, fields in enumerate((fields for fields in reader if fields), start=1):
            if len(fields) != len(header):
                raise ValueError(
                    f"{name}, row {number} (ends on line {reader.line_num}): {len(fields)} fields, the header has "
                    f"{len(header)}. Quote fields that hold commas, quotes or line breaks."
                )
            yield number, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise ValueError(f"{name}, line {reader.line_num}: broken CSV ({error}). Mend the quoting there.") from None


def _source_of_parquet(name: str, file: Path) -> Source:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def records() -> Iterator[Record]:
        number = 0
        try:
            for batch in pq.ParquetFile(file).iter_batches(batch_size=1000):
                for record in batch.to_pylist():
                    number += 1
                    yield number, record
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"{name}, after row {number}: cannot be read on as parquet ({_first_line(error)}): copy it anew."
            ) from None

    try:
        parquet = pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{name}: not a readable parquet file ({_first_line(error)}). It is damaged or half copied: copy it anew."
        ) from None
    if parquet.metadata.num_rows == 0:
        raise ValueError(f"{name}: holds no rows.")
    return Source(name, parquet.schema_arrow.names, records, digest_of_file(file))


def _source_of_arrow(name: str, file: Path) -> Source:
    import pyarrow as pa

    def table() -> pa.Table:
        try:
            stream = pa.memory_map(str(file))
            is_file_format = stream.read(6) == b"ARROW1"
            stream.seek(0)
            return (pa.ipc.open_file if is_file_format else pa.ipc.open_stream)(stream).read_all()
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"{name}: not a readable Arrow file or stream ({_first_line(error)}). It is damaged, half copied or "
                "another format: copy it anew or rename it."
            ) from None

    def records() -> Iterator[Record]:
        rows = (row for batch in table().to_batches(max_chunksize=1000) for row in batch.to_pylist())
        yield from enumerate(rows, start=1)

    opened = table()
    if opened.num_rows == 0:
        raise ValueError(f"{name}: holds no rows.")
    return Source(name, opened.column_names, records, digest_of_file(file))


def _load_folder(folder: Path, splits: Sequence[str]) -> Any:
    import datasets

    if not any((folder / marker).exists() for marker in ("state.json", "dataset_dict.json")):
        held = sorted(entry.name for entry in folder.iterdir())[:5]
        raise ValueError(
            f"{folder}: a folder that save_to_disk did not write (it holds {held}). Name the files in it one by one."
        )
    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # datasets raises a dozen kinds for a damaged folder; each means the same to the user
        raise ValueError(
            f"{folder}: not a readable save_to_disk folder ({_first_line(error)}). Save it anew."
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        split = next((split for split in splits if split in loaded), None)
        if split is None:
            raise ValueError(
                f"{folder}: has no split {' or '.join(map(repr, splits))}; it has {sorted(loaded)}. "
                f"Name the folder of one of these, such as {folder / min(loaded)}."
            )
        loaded = loaded[split]
    return loaded


def _load_by_name(name: str, splits: Sequence[str]) -> Any:
    import datasets

    path, config, own_split = [*name.split(":", 2), "", ""][:3]
    splits = [own_split] if own_split else splits
    for split in splits:
        try:
            return datasets.load_dataset(path, config or None, split=split)
        except Exception as error:  # not found, no network ...: one message with the library's own reason
            if "Unknown split" in str(error) and split != splits[-1]:
                continue
            raise ValueError(
                f"{name!r} is neither a file or folder here nor a data set that datasets.load_dataset(split={split!r}) "
                f"can load ({type(error).__name__}: {_first_line(error)}). Check the spelling, the split (name::split, "
                "or name:config:split) and the network."
            ) from error
    raise AssertionError("the last split returns or raises")


def _source_of_dataset(name: str, dataset: Any, digest: str) -> Source:
    if len(dataset) == 0:
        raise ValueError(f"{name}: holds no rows.")
    return Source(name, list(dataset.column_names), lambda: iter(enumerate(dataset, start=1)), digest)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
