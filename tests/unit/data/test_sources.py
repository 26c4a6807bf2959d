"""Every format gives the same rows back; a file that is not what its name says is refused with a remedy."""

from __future__ import annotations

import csv
import functools
import json
import re

import datasets
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

from cc_ds.data import read_rows
from cc_ds.data.sources import open_source

RECORDS = [
    {"instruction": "A\u2028, B?", "input": "a,b", "output": 'Nzuri "sana"\nC', "instruction_en": "Hi?", "lang": "sw"},
    {"instruction": "Wie geht's?", "input": "", "output": "Gut", "instruction_en": "How are you?", "lang": "de"},
    {"instruction": "Wer?", "input": "", "output": "Ich", "instruction_en": None, "lang": "de"},
]  # fmt: skip


def write(path, records=RECORDS):
    table = pa.Table.from_pylist(records)
    if path.suffix == ".json":
        path.write_text(json.dumps(records), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    elif path.suffix == ".csv":
        with open(path, "w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, records[0])
            writer.writeheader()
            writer.writerows(records)
    elif path.suffix == ".parquet":
        pa.parquet.write_table(table, path)
    elif path.name == "file.arrow":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    elif path.suffix == ".arrow":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    else:
        datasets.Dataset.from_list(records).save_to_disk(path)
    return path


FORMATS = ["rows.json", "rows.jsonl", "rows.csv", "rows.parquet", "file.arrow", "stream.arrow", "folder"]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_rows(tmp_path, name):
    path = write(tmp_path / name)
    rows, summary = read_rows(path)
    assert [row.prompt[-1]["content"] for row in rows] == ["A\u2028, B?\na,b", "Wie geht's?", "Wer?"]
    assert [row.response for row in rows] == [record["output"] for record in RECORDS]
    assert [row.prompt_en and row.prompt_en[0]["content"] for row in rows] == ["Hi?", "How are you?", None]
    assert [row.lang for row in rows] == ["sw", "de", "de"]
    assert [row.source for row in rows] == [f"{path}:{number}" for number in (1, 2, 3)]
    assert (summary.rows, summary.rows_with_english, summary.rows_by_lang) == (3, 2, {"sw": 1, "de": 2})


@pytest.mark.parametrize("name", FORMATS)
def test_digest_follows_the_content(tmp_path, name):
    first = open_source(write(tmp_path / name)).digest
    assert open_source(tmp_path / name).digest == first
    changed = [{**RECORDS[0], "output": "mbaya"}, *RECORDS[1:]]
    (tmp_path / "other").mkdir()
    assert open_source(write(tmp_path / "other" / name, changed)).digest != first


def test_json_with_data_key_and_several_sources(tmp_path):
    wrapped = tmp_path / "wrapped.json"
    wrapped.write_text(json.dumps({"data": RECORDS}))
    rows, _ = read_rows([wrapped, write(tmp_path / "rows.csv")])
    assert len(rows) == 6
    assert rows[3].source.endswith("rows.csv:1")


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.csv"])
def test_byte_order_mark_is_accepted(tmp_path, name):
    path = write(tmp_path / name)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(read_rows(path)[0]) == 3


def test_jsonl_rows_are_named_by_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n" + json.dumps(RECORDS[0]) + "\r\n\n" + json.dumps(RECORDS[1]))
    assert [row.source for row in read_rows(path)[0]] == [f"{path}:2", f"{path}:4"]


def test_fields_longer_than_the_csv_default(tmp_path):
    path = write(tmp_path / "rows.csv", [{**RECORDS[0], "output": "x" * 200_000}])
    assert len(read_rows(path)[0][0].response) == 200_000


def test_split_of_a_saved_dataset_dict(tmp_path):
    saved = datasets.DatasetDict({"dev": datasets.Dataset.from_list(RECORDS)})
    saved.save_to_disk(tmp_path / "saved")
    assert len(read_rows(tmp_path / "saved", split="dev")[0]) == 3
    with pytest.raises(ValueError, match=r"no split 'train'; it has \['dev'\]"):
        read_rows(tmp_path / "saved")


def test_the_first_split_that_there_is(tmp_path, monkeypatch):
    """In a saved DatasetDict and in a data set of the hub, here with the library's own word for a split it lacks."""
    files = {name: str(write(tmp_path / f"{name}.json", RECORDS[:rows])) for name, rows in (("train", 3), ("test", 2))}
    load = functools.partial(datasets.load_dataset, "json", data_files=files, cache_dir=tmp_path / "cache")
    load().save_to_disk(tmp_path / "saved")
    monkeypatch.setattr(datasets, "load_dataset", lambda path, config, split: load(split=split))
    for source in (tmp_path / "saved", "someone/pairs"):
        assert len(read_rows(source)[0]) == 3
        assert len(read_rows(source, split=("validation", "test"))[0]) == 2
        with pytest.raises(ValueError, match=r"validation"):
            read_rows(source, split=("dev", "validation"))
    assert len(read_rows(tmp_path / "saved" / "train", split=("validation", "test"))[0]) == 3
    assert len(read_rows("someone/pairs::train", split=("validation", "test"))[0]) == 3


@pytest.mark.parametrize(
    ("name", "config", "split"),
    [("a/b:c", "c", "train"), ("a/b:c:test", "c", "test"), ("a/b::train[:90%]", None, "train[:90%]")],
)
def test_config_and_split_in_a_datasets_name(monkeypatch, name, config, split):
    def load_dataset(*args, **kwargs):
        assert (args, kwargs) == (("a/b", config), {"split": split})
        return datasets.Dataset.from_list(RECORDS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(read_rows(name)[0]) == 3


def test_a_datasets_name_is_loaded_without_remote_code(monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return datasets.Dataset.from_list(RECORDS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows, _ = read_rows("someone/pairs", split="test")
    assert calls == [(("someone/pairs", None), {"split": "test"})]
    assert rows[1].source == "someone/pairs:2"


def test_a_datasets_name_that_cannot_be_loaded(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'someone/pears' doesn't exist on the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        ValueError, match=r"'someone/pears' is neither a file or folder here nor a data set .*doesn't exist"
    ):
        read_rows("someone/pears")


GOOD = json.dumps(RECORDS[0]).encode()
PARQUET_HEAD = b"PAR1\x15\x04\x15"
BAD_FILES = {
    "parquet named jsonl": ("a.jsonl", PARQUET_HEAD, r"line 1: not jsonl but a parquet file: rename it to .parquet"),
    "parquet named csv": ("a.csv", PARQUET_HEAD, r"not csv but a parquet file"),
    "arrow named parquet": ("a.parquet", b"ARROW1\0\0", r"not parquet but an Arrow file: rename it to .arrow"),
    "gzip": ("a.jsonl", b"\x1f\x8b\x08\x00", r"gunzip"),
    "spreadsheet": ("a.csv", b"PK\x03\x04....", r"export it as .csv"),
    "utf-16": ("a.json", "[]".encode("utf-16"), r"UTF-16 text: convert it to UTF-8"),
    "list named jsonl": ("a.jsonl", b"[" + GOOD + b"]", r"rename it to .json\b"),
    "lines named json": ("a.json", GOOD + b"\n" + GOOD, r"line 2: .*JSON lines: rename it to .jsonl"),
    "lines named csv": ("a.csv", GOOD + b"\n" + GOOD, r"JSON lines: rename it to .jsonl"),
    "lines named parquet": ("a.parquet", GOOD, r"JSON lines: rename it to .jsonl"),
    "broken line": ("a.jsonl", (GOOD + b"\n") * 16 + GOOD[:-1], r"line 17, column \d+: broken JSON .*mend or remove"),
    "line that is no object": ("a.jsonl", GOOD + b"\n3", r"line 2: a int, not an object"),
    "broken json": ("a.json", b"[\n" + GOOD + b",\n{]", r"line 3, column \d+: broken JSON"),
    "json of one value": ("a.json", b"3", r"holds one int; expected a list"),
    "json with other keys": ("a.json", b'{"rows": []}', r"keys \['rows'\]; expected a list of objects"),
    "json row that is no object": ("a.json", b"[" + GOOD + b", 3]", r"row 2: a int, not an object"),
    "not utf-8, jsonl": ("a.jsonl", GOOD + b'\n{"output": "\xff"}', r"line 2: byte 0xff is not UTF-8. Convert"),
    "not utf-8, json": ("a.json", b'[\n{"output": "\xff"}]', r"line 2: byte 0xff is not UTF-8. Convert"),
    "not utf-8, csv": ("a.csv", b"instruction,output\na,b\n\xff,b", r"line 3: byte 0xff is not UTF-8. Convert"),
    "ragged csv": ("a.csv", b"instruction,output\na,b\na,b,c\n", r"row 2 .ends on line 3.: 3 fields, the header has 2"),
    "open quote": ("a.csv", b'instruction,output\n"a,b\n', r"broken CSV"),
    "twin columns": ("a.csv", b"output,output\na,b\n", r"stands twice"),
    "header only": ("a.csv", b"instruction,output\n", r"holds no rows"),
    "half a parquet": ("a.parquet", PARQUET_HEAD, r"not a readable parquet file .*copy it anew"),
    "half an arrow file": ("a.arrow", b"ARROW1\0\0\xff\xff", r"not a readable Arrow file or stream"),
    "no arrow": ("a.arrow", b"something", r"not a readable Arrow file or stream"),
    "empty": ("a.jsonl", b"", r"is empty"),
    "blank": ("a.json", b"\xef\xbb\xbf \n", r"is empty"),
    "unknown": ("a.xlsx", b"...", r"unknown data format '.xlsx'. Use one of .json,"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_named_with_a_remedy(tmp_path, case):
    name, content, message = BAD_FILES[case]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_rows(path)
    assert str(path) in str(caught.value)


def test_missing_file_and_foreign_folder(tmp_path):
    with pytest.raises(ValueError, match=r"no such file or folder"):
        read_rows(tmp_path / "absent.jsonl")
    with pytest.raises(ValueError, match=r"no such file or folder"):
        read_rows("absent.jsonl")
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "rows.csv")
    with pytest.raises(ValueError, match=r"save_to_disk did not write \(it holds \['rows.csv'\]\)"):
        read_rows(tmp_path / "data")


def test_rows_without_columns_in_a_parquet_file(tmp_path):
    path = tmp_path / "none.parquet"
    pa.parquet.write_table(pa.Table.from_pylist([], schema=pa.schema({"prompt": pa.string()})), path)
    with pytest.raises(ValueError, match=re.escape(f"{path}: holds no rows")):
        read_rows(path)
