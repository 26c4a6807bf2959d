"""Tokenise the data once, keep it on disk, and open it memory-mapped ever after.

`load_tokenised` looks for a folder named by everything that the result depends on (the sources' content, the
tokenizer, the template, the options). If it is there and whole, it is opened; else the rows are tokenised into a
folder of another name, which is renamed at the end. So a killed run leaves no half cache behind, and of several
processes at work at once each ends with a whole one. A folder holds

    data.arrow      the tokenised rows (see encode.py), an Arrow stream
    summary.json    what was read, cut and left out, so that a cached load reports the same
    manifest.json   the SHA-256 of both, by which damage is recognised, and of the rows (`rows_digest`)
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from cc_ds.data.columns import without_english
from cc_ds.data.encode import check_limits, tokenise_row
from cc_ds.data.pairs import BadRow, Summary, iter_rows, open_sources
from cc_ds.data.sources import Source, digest_of_file, digest_of_folder
from cc_ds.data.templates import Template, load_template

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

FORMAT_VERSION = 3  # raise it whenever the same input would give other rows
ROWS_PER_BATCH = 1000
STALE_AFTER_SECONDS = 24 * 3600
SAY_EVERY_SECONDS = 30.0

log = logging.getLogger(__name__)


def load_tokenised(
    paths: str | Path | Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    template: Template | str | None,
    *,
    max_length: int,
    max_english_length: int | None = None,
    on_long: str = "truncate",
    on_bad_row: str = "skip",
    column_map: Mapping[str, str] | None = None,
    split: str | Sequence[str] = "train",
    require_english: bool = False,
    cache_dir: str | Path,
) -> tuple[datasets.Dataset, Summary]:
    """The tokenised rows of all sources, memory-mapped, and the summary of how they came about.

    `template` is a Template, a built-in name, or None for the tokenizer's own. `max_english_length` None means
    `max_length`; `split`: see `open_source`. Columns of the data set: see `tokenise_row`. Raises ValueError for what is
    wrong with the data (see sources.py, columns.py), for a row that is too long when `on_long` is "error", for bad rows
    when `on_bad_row` is "error", and when `require_english` and no row has English.
    """
    template = template if isinstance(template, Template) else load_template(tokenizer, template)
    limits = (max_length, max_english_length or max_length, on_long)
    check_limits(template, *limits)
    sources, column_map = open_sources(paths, split), dict(column_map or {})
    key = _cache_key(sources, template, {"limits": limits, "column_map": column_map, "split": split})
    folder = Path(cache_dir).expanduser() / f"tokenised-{key[:32]}"
    opened = _open(folder)
    if opened is None:
        log.info("tokenising %s into %s", [source.name for source in sources], folder)
        building = folder.with_name(f".building-{uuid.uuid4().hex}")
        _sweep(folder.parent)
        try:
            _build(building, sources, template, limits, column_map)
            opened = _place(building, folder)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    rows, summary = opened
    summary.check(on_bad_row)
    if require_english and not summary.rows_with_english:
        raise ValueError(f"{without_english(sources, column_map)}\n{summary}")
    return rows, summary


def rows_digest(rows: datasets.Dataset) -> str | None:
    """SHA-256 of rows that `load_tokenised` gave, whatever their files are called; None for others."""
    if not rows.cache_files:
        return None
    manifest = Path(rows.cache_files[0]["filename"]).with_name("manifest.json")
    return json.loads(manifest.read_text(encoding="utf-8"))["rows"] if manifest.exists() else None


def _cache_key(sources: Sequence[Source], template: Template, options: Mapping[str, Any]) -> str:
    parts = {
        "version": FORMAT_VERSION,
        "sources": [(source.name, source.digest) for source in sources],
        "tokenizer": _tokenizer_digest(template.tokenizer),
        "template": template.chat_template,
        "bos": template.bos_id,
        **options,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of the vocabulary, merges, normalisation and special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        state.pop("padding"), state.pop("truncation")  # these change as the tokenizer is used
        files = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
    else:
        with TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            files = digest_of_folder(Path(folder))
    special = json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)
    return hashlib.sha256(f"{files} {special}".encode()).hexdigest()


def _build(
    building: Path, sources: Sequence[Source], template: Template, limits: tuple, column_map: Mapping[str, str]
) -> None:
    """Tokenise everything into a fresh folder."""
    import pyarrow as pa

    building.mkdir(parents=True)
    summary, digest = Summary(), hashlib.sha256()
    with pa.OSFile(str(building / "data.arrow"), "wb") as sink, pa.ipc.new_stream(sink, _schema()) as writer:
        rows = _tokenised_rows(sources, template, limits, column_map, summary)
        batch = None
        while batch is None or batch:  # one batch at least, and an empty one last: no stream without any
            batch = list(islice(rows, ROWS_PER_BATCH))
            columns = pa.RecordBatch.from_pylist(batch, schema=_schema())
            writer.write_batch(columns)
            digest.update(columns.drop_columns(["source"]).serialize())
    (building / "summary.json").write_text(summary.to_json(), encoding="utf-8")
    digests = {name: digest_of_file(building / name) for name in ("data.arrow", "summary.json")}
    manifest = digests | {"rows": digest.hexdigest()}
    (building / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def _tokenised_rows(
    sources: Sequence[Source], template: Template, limits: tuple, column_map: Mapping[str, str], summary: Summary
) -> Iterator[dict[str, Any]]:
    """The rows to keep, everything counted in `summary` on the way."""
    begin = said = time.monotonic()
    for row in iter_rows(sources, column_map, summary):
        if time.monotonic() - said > SAY_EVERY_SECONDS:
            said = time.monotonic()
            log.info("%d rows tokenised so far, %.0f a second", summary.rows, summary.rows / (said - begin))
        tokenised = row if isinstance(row, BadRow) else tokenise_row(row, template, *limits)
        if isinstance(tokenised, BadRow):
            summary.add_bad(tokenised)
            continue
        summary.add_row(row.lang, row.prompt_en is not None)
        summary.prompts_cut += tokenised["prompt_cut"]
        summary.responses_cut += tokenised["response_cut"]
        summary.english_cut += tokenised["english_cut"]
        yield tokenised


def _schema() -> pa.Schema:
    import pyarrow as pa

    ids, flag = pa.list_(pa.int32()), pa.bool_()
    return pa.schema(
        {
            "input_ids": ids,
            "labels": ids,
            "anchor": pa.int32(),
            "english_input_ids": ids,
            "english_anchor": pa.int32(),
            "lang": pa.string(),
            "source": pa.string(),
            "prompt_cut": flag,
            "response_cut": flag,
            "english_cut": flag,
        }
    )


def _open(folder: Path) -> tuple[datasets.Dataset, Summary] | None:
    """The cache in `folder`, or None if there is none or it is damaged."""
    import datasets

    try:
        digests = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if any(digest_of_file(folder / name) != digests.get(name) for name in ("data.arrow", "summary.json")):
            log.warning("the cache %s is damaged and will be built anew", folder)
            return None
        summary = Summary.from_json((folder / "summary.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        log.warning("the cache %s is damaged and will be built anew", folder)
        return None
    return datasets.Dataset.from_file(str(folder / "data.arrow")), summary


def _place(building: Path, folder: Path) -> tuple[datasets.Dataset, Summary]:
    """Give the finished folder its name. A whole cache that another process placed meanwhile is used instead."""
    for _ in range(10):
        try:
            os.rename(building, folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        opened = _open(folder)
        if opened is not None:
            return opened
        # Damaged, since before we came: out of the way with it. A reader that has it open keeps its pages.
        aside = folder.with_name(f".damaged-{uuid.uuid4().hex}")
        try:
            os.rename(folder, aside)
        except FileNotFoundError:
            continue
        shutil.rmtree(aside, ignore_errors=True)
    raise OSError(f"the cache {folder} cannot be read back after writing: check the disk, or name another cache_dir.")


def _sweep(cache_dir: Path) -> None:
    """Remove what runs killed in the middle of building left behind more than a day ago."""
    for left in [*cache_dir.glob(".building-*"), *cache_dir.glob(".damaged-*")]:
        if time.time() - left.stat().st_mtime > STALE_AFTER_SECONDS:
            shutil.rmtree(left, ignore_errors=True)
