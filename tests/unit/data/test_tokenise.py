"""The cache: tokenised once, the same summary every time, never half, mended when damaged, safe for processes."""

from __future__ import annotations

import json
import multiprocessing
import shutil

import datasets
import pytest

from cc_ds.data import load_template, load_tokenised, read_rows, tokenise_row
from cc_ds.data import tokenise as module
from cc_ds.data.tokenise import rows_digest

RECORDS = [
    {"instruction": "Je, mji mkuu wa Kenya ni upi?", "output": "Nairobi.", "instruction_en": "Capital?", "lang": "sw"},
    {"instruction": "Kenya " * 200, "output": "Nairobi.", "instruction_en": "Kenya " * 200, "lang": "sw"},
    {"instruction": "Was?", "output": "Kenya " * 200, "lang": "de"},
    {"instruction": "Was?", "output": "", "lang": "de"},
]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return path


@pytest.fixture
def calls(monkeypatch):
    """The rows tokenised so far."""
    calls = []

    def counted(row, *args):
        calls.append(row.source)
        return tokenise_row(row, *args)

    monkeypatch.setattr(module, "tokenise_row", counted)
    return calls


@pytest.fixture
def load(path, bpe, tmp_path):
    def load(tokenizer=bpe, template="chatml", **options):
        options = {"max_length": 64, "max_english_length": 32, "cache_dir": tmp_path / "cache", **options}
        return load_tokenised(path, tokenizer, template, **options)

    return load


def cache_folder(tmp_path):
    (folder,) = (tmp_path / "cache").iterdir()  # one, so nothing half or damaged lies beside it
    return folder


def test_rows_and_summary(load, path, bpe):
    dataset, summary = load()
    template = load_template(bpe, "chatml")
    assert dataset.to_list() == [tokenise_row(row, template, 64, 32) for row in read_rows(path)[0]]
    assert dataset.cache_files, "the rows are memory-mapped from the cache"
    assert (summary.rows, summary.rows_with_english, summary.rows_by_lang) == (3, 2, {"sw": 2, "de": 1})
    assert (summary.prompts_cut, summary.responses_cut, summary.english_cut) == (1, 1, 1)
    assert summary.bad_rows == {"the response is empty": 1}
    assert "cut to length: 1 prompts, 1 responses, 1 English prompts" in str(summary)


def test_no_row_with_english_is_refused_where_it_is_needed(bpe, tmp_path, load):
    assert load(require_english=True)[1].rows_with_english == 2, "some rows may lack it"
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"instruction": "Je?", "output": "Ndiyo.", "question_in_english": "Is it?"}))
    options = {"max_length": 64, "cache_dir": tmp_path / "other"}
    assert load_tokenised(path, bpe, "chatml", **options)[1].rows == 1, "plain SFT may lack it all"
    said = r"No row has an English.*mine.jsonl: looked for in 'instruction_en'; found: .*'question_in_english'.*map "
    for _ in range(2):  # tokenised, and read from the cache
        with pytest.raises(ValueError, match=f"(?s){said}.*1 rows, 0 of them with English"):
            load_tokenised(path, bpe, "chatml", require_english=True, **options)
    column_map = {"instruction_en": "question_in_english"}
    load_tokenised(path, bpe, "chatml", require_english=True, column_map=column_map, **options)


def test_second_load_does_not_tokenise(load, calls):
    dataset, summary = load()
    assert len(calls) == 3
    again, same = load()
    assert len(calls) == 3
    assert again.to_list() == dataset.to_list()
    assert (same, str(same)) == (summary, str(summary))


def test_everything_that_changes_the_rows_changes_the_cache(load, calls, path, make_bpe, make_llama):
    load()
    marked = make_bpe()
    marked.add_tokens(["Kenya"])
    for options in (
        {"max_length": 65},
        {"max_english_length": 33},
        {"on_long": "skip"},
        {"template": "llama3"},
        {"tokenizer": make_llama()},
        {"tokenizer": make_bpe(bos=False)},
        {"tokenizer": marked},
        {"column_map": {"output": "output"}},
    ):
        before = len(calls)
        load(**options)
        assert len(calls) == before + 3, options
    before = len(calls)
    path.write_text(path.read_text().replace("Nairobi", "Mombasa"))
    load()
    assert len(calls) == before + 3


def test_use_of_the_tokenizer_does_not_change_the_cache(load, calls, make_bpe):
    tokenizer = make_bpe()
    load(tokenizer=tokenizer)
    digest = module._tokenizer_digest(tokenizer)
    tokenizer(["Kenya", "Kenya ni"], padding=True, truncation=True, max_length=3)
    assert module._tokenizer_digest(tokenizer) == digest
    load(tokenizer=tokenizer)
    load(tokenizer=make_bpe())
    assert len(calls) == 3


def test_a_killed_run_leaves_no_half_cache(load, calls, monkeypatch, tmp_path):
    def killed(*args):
        if len(calls) == 2:
            calls.clear()
            raise KeyboardInterrupt
        calls.append(args)
        return tokenise_row(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, "tokenise_row", killed)
        with pytest.raises(KeyboardInterrupt):
            load()
    assert list((tmp_path / "cache").iterdir()) == []

    with monkeypatch.context() as patch:  # killed at the very end, before the folder has its name

        def killed_rename(*args):
            raise KeyboardInterrupt

        patch.setattr(module.os, "rename", killed_rename)
        with pytest.raises(KeyboardInterrupt):
            load(max_length=66)
    assert list((tmp_path / "cache").iterdir()) == []
    calls.clear()

    # kill -9 runs no clean-up: the half folder stays, under a name that no load looks for
    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "rmtree", lambda *args, **kwargs: None)
        patch.setattr(module, "tokenise_row", killed)
        with pytest.raises(KeyboardInterrupt):
            load()
    (left,) = (tmp_path / "cache").iterdir()
    assert left.name.startswith(".building-")
    calls.clear()
    dataset, _ = load()
    assert (len(dataset), len(calls)) == (3, 3)

    monkeypatch.setattr(module, "STALE_AFTER_SECONDS", -1)
    load(max_length=65)
    assert not left.exists()


@pytest.mark.parametrize("damage", ["flipped", "short", "gone", "summary", "manifest", "empty"])
def test_a_damaged_cache_is_built_anew(load, calls, tmp_path, damage):
    rows = load()[0].to_list()
    folder = cache_folder(tmp_path)
    data = folder / "data.arrow"
    blob = bytearray(data.read_bytes())
    if damage == "flipped":
        blob[len(blob) // 2] ^= 1
        data.write_bytes(blob)
    elif damage == "short":
        data.write_bytes(blob[:-100])
    elif damage == "gone":
        data.unlink()
    elif damage == "summary":
        (folder / "summary.json").write_text("{}")
    elif damage == "manifest":
        (folder / "manifest.json").write_text('{"data')
    else:
        (folder / "manifest.json").write_text("")
    calls.clear()
    dataset, summary = load()
    assert (dataset.to_list(), summary.rows, len(calls)) == (rows, 3, 3)
    assert cache_folder(tmp_path) == folder
    load()
    assert len(calls) == 3


def test_a_cache_placed_meanwhile_is_used(load, monkeypatch, tmp_path):
    """Two processes tokenise at once; the later one to finish takes what the first has placed."""
    build, nested = module._build, []

    def build_after_another(*args):
        build(*args)
        if not nested:
            nested.append(True)
            load()

    monkeypatch.setattr(module, "_build", build_after_another)
    dataset, summary = load()
    assert (len(dataset), summary.rows) == (3, 3)
    cache_folder(tmp_path)


def _load_and_count(load_options, queue):
    dataset, summary = load_tokenised(**load_options)
    queue.put((len(dataset), str(summary), sum(map(len, dataset["input_ids"]))))


def test_the_digest_of_rows_is_that_of_their_tokens(load, tmp_path):
    rows, _ = load(max_length=640)
    longer, _ = load(max_length=641)  # another cache of the same rows
    assert rows_digest(rows) == rows_digest(longer) and len(rows_digest(rows)) == 64
    assert rows_digest(load(template="plain", max_length=640)[0]) != rows_digest(rows)
    assert rows_digest(datasets.Dataset.from_list([{"input_ids": [1]}])) is None


def test_the_digest_of_rows_is_not_that_of_their_files_name(load, path, bpe, tmp_path):
    other = tmp_path / "elsewhere" / f"renamed{path.suffix}"
    other.parent.mkdir()
    shutil.copy(path, other)
    rows = load()[0]
    moved, _ = load_tokenised(other, bpe, "chatml", max_length=64, max_english_length=32, cache_dir=tmp_path / "cache")
    assert rows["source"] != moved["source"] and rows_digest(rows) == rows_digest(moved)


def test_several_processes_at_once(path, bpe, tmp_path):
    options = {"paths": path, "tokenizer": bpe, "template": "chatml", "max_length": 64, "cache_dir": tmp_path / "cache"}
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_load_and_count, args=(options, queue)) for _ in range(4)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(set(results)) == 1
    cache_folder(tmp_path)


def test_bad_rows_end_the_run_cached_or_not(load, calls):
    for _ in range(2):
        with pytest.raises(ValueError, match=r"1 bad rows:[\s\S]*rows.jsonl:4: the response is empty"):
            load(on_bad_row="error")
    assert len(calls) == 3
    assert load(on_bad_row="skip")[1].rows == 3


def test_long_rows(load, tmp_path):
    with pytest.raises(ValueError, match=r"rows.jsonl:2: prompt .* exceed max_length 64"):
        load(on_long="error")
    assert list((tmp_path / "cache").iterdir()) == []
    dataset, summary = load(on_long="skip")
    assert (len(dataset), summary.skipped_long) == (1, 2)
    assert load(max_length=2048, max_english_length=None, on_long="error")[1].rows == 3


def test_all_rows_bad_is_an_error(load):
    with pytest.raises(ValueError, match="No row is left"):
        load(max_length=12, max_english_length=12, on_long="skip")
