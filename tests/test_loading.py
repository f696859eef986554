"""Rows come from files, folders and streams as they stand there, and what is wrong is named by file and line."""

from __future__ import annotations

import bz2
import gzip
import json
import logging
import lzma
import multiprocessing
import os
import tracemalloc
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.distributed import split_dataset_by_node
from helpers.data import ROWS, make_tokenizer, write_jsonl

from selfgen.data import load_rows, tokenize_rows
from selfgen.data.loading import row_files
from selfgen.data.loading.row_files import format_of, read_rows

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {"lat": 6.7216, "n": 2**70}}]}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return folder


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(rows, **options) -> str:
    return "".join(json.dumps(row, **options) + "\n" for row in rows)


def exactly(rows) -> list:
    """Rows with the types of their cells: 1, 1.0 and True are equal to Python."""
    return [json.dumps(row, sort_keys=True) for row in rows]


# Single files

PACK = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda raw: pa.Codec("zstd").compress(raw, asbytes=True),
}
JSON = lines(ROWS).encode()
CSV = b"prompt,completion\na b,c d\ne,f g h\n"
FILES = {
    "rows.jsonl": JSON,
    "rows.ndjson": JSON,
    "rows.JSONL": JSON,
    "rows.json": json.dumps(ROWS, indent=1).encode(),
    "one line.json": json.dumps(ROWS).encode(),
    "pretty.jsonl": lines(ROWS, indent=2).encode(),
    "crlf.jsonl": JSON.replace(b"\n", b"\r\n"),
    "cr.jsonl": JSON.replace(b"\n", b"\r"),
    "bom.jsonl": b"\xef\xbb\xbf" + JSON,
    "blank.jsonl": b"\n\n" + JSON.replace(b"\n", b"\n \n").rstrip(),
    "glued.jsonl": JSON.replace(b"\n", b""),
    "rows[1].jsonl": JSON,  # not a glob pattern
    "v1.0 of rows.jsonl": JSON,
    "rows.csv": CSV,
    "crlf.CSV": b"\xef\xbb\xbf" + CSV.replace(b"\n", b"\r\n"),
    "rows.tsv": CSV.replace(b",", b"\t"),
    **{f"rows.jsonl.{ending}": pack(JSON) for ending, pack in PACK.items()},
    **{f"rows.csv.{ending.upper()}": pack(CSV) for ending, pack in PACK.items()},
}


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
@pytest.mark.parametrize("name", FILES)
def test_every_form_of_rows(name, chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(row_files, "_CHUNK", chunk)
    assert load_rows(write(tmp_path / name, FILES[name])).to_list() == ROWS


WRITERS = {
    "rows.parquet": lambda path: datasets.Dataset.from_list(ROWS).to_parquet(path),
    "rows.PARQUET": lambda path: datasets.Dataset.from_list(ROWS).to_parquet(path),
    "saved": lambda path: datasets.Dataset.from_list(ROWS).save_to_disk(path),
    "saved_dict": lambda path: datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)).save_to_disk(path),
    "folder.jsonl": lambda path: write(path / "part-0.jsonl", JSON),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_other_kind_of_file(name, tmp_path, monkeypatch):
    WRITERS[name](tmp_path / name)
    assert load_rows(tmp_path / name).to_list() == ROWS
    assert load_rows(str(tmp_path / name)).to_list() == ROWS
    assert list(load_rows(tmp_path / name, streaming=True)) == ROWS
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_rows(f"~/{name}").to_list() == ROWS


def test_arrow(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path)
    file = next(tmp_path.glob("*.arrow"))
    assert load_rows(file).to_list() == ROWS
    assert load_rows(file.rename(tmp_path / "x.ARROW")).to_list() == ROWS


TEXTS = [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]
if hasattr(datasets, "Json"):  # older versions refuse it by name
    TEXTS.append(pa.string_view())


@pytest.mark.parametrize("kind", TEXTS, ids=str)
def test_every_kind_of_text_in_parquet(kind, tmp_path):
    table = pa.table({name: pa.array([row[name] for row in ROWS]).cast(kind) for name in ROWS[0]})
    pq.write_table(table, tmp_path / "rows.parquet")
    examples, _ = tokenize_rows(load_rows(tmp_path / "rows.parquet"), make_tokenizer(), max_length=16)
    assert len(examples) == len(ROWS)


# What a cell is

COLUMNS = {
    "dates": ["2024-01-05", "1969-07-20"],
    "time": ["2024-01-05T10:00:00Z", "2024-01-05 10:00"],
    "numbers as text": ["007", "1e5"],
    "text or null": [None, "a"],
    "nothing": [None, None],
    "integers": [2**63 - 1, -(2**63)],
    "long integers": [2**63, 1],
    "floats": [0.1, 1e308],
    "integers and floats": [1, 2.5],
    "booleans": [True, None],
    "booleans and integers": [True, 1],
    "text and messages": ["a", TURNS],
    "JSON as text": ['["a"]', "{"],
    "messages": [TURNS, [*TURNS, CALL]],
    "no messages": [[], TURNS],
    "null in messages": [[{"role": "user", "content": None}], [{"role": "user"}]],
    "objects": [{"a": 1}, {"b": {"c": [1, "x", None, 0.7579544029403025]}}],
    "empty objects": [{}, {"a": {}}],
    "odd text": ["\u2028\x85\x00\ufeff", "\U0001f600\r\n"],
    "": ["no", "name"],
}


@pytest.mark.parametrize("ensure_ascii", [True, False])
@pytest.mark.parametrize("column", COLUMNS)
def test_a_cell_is_what_json_makes_of_it(column, ensure_ascii, tmp_path):
    rows = [{"n": n, column: cell} for n, cell in enumerate(COLUMNS[column])]
    file = write(tmp_path / "rows.jsonl", lines(rows, ensure_ascii=ensure_ascii))
    loaded = load_rows(file)
    assert exactly(loaded) == exactly(rows)
    assert exactly({column: cell} for cell in loaded[column][:]) == exactly({column: row[column]} for row in rows)
    assert exactly(load_rows(file, streaming=True)) == exactly(rows)
    # as `tokenize_rows` reads them
    mapped = loaded.map(
        lambda cell: {"seen": json.dumps(cell)}, input_columns=column, remove_columns=loaded.column_names
    )
    assert mapped["seen"][:] == [json.dumps(row[column]) for row in rows]


def test_plain_columns_have_plain_types(tmp_path):
    rows = [{"a": None, "b": 1, "c": 1.5, "d": True, "e": None}, {"a": "x", "b": None, "c": float("nan"), "d": False}]
    loaded = load_rows(write(tmp_path / "rows.jsonl", lines(rows)))
    assert [feature.dtype for feature in loaded.features.values()] == ["string", "int64", "float64", "bool", "string"]
    assert loaded["c"][1] != loaded["c"][1]


def test_what_a_row_lacks_is_none_but_nothing_is_added_within_cells(tmp_path):
    rows = [{"messages": TURNS}, {"messages": [CALL], "tools": [{"x": 1}]}]
    file = write(tmp_path / "rows.jsonl", lines(rows))
    assert list(load_rows(file)) == [rows[0] | {"tools": None}, rows[1]]
    assert list(load_rows(file, streaming=True)) == rows


@pytest.mark.parametrize(
    "later", [{"new": "x"}, {"first": "value"}, {"messages": [CALL]}, {"prompt": 7}, {"prompt": ["x"]}]
)
def test_what_comes_after_many_megabytes_loads_as_in_a_small_file(later, tmp_path):
    rows = [{"prompt": "x" * 20_000, "first": None, "messages": TURNS}] * 550 + [later]  # 11 MB
    loaded = load_rows(write(tmp_path / "rows.jsonl", lines(rows)))
    assert {name: cell for name, cell in loaded[550].items() if cell is not None} == later
    assert {name: cell for name, cell in loaded[0].items() if cell is not None} == {
        "prompt": "x" * 20_000,
        "messages": TURNS,
    }


@pytest.mark.skipif(not hasattr(datasets, "Json"), reason="this version of datasets has no Json")
def test_json_that_datasets_has_saved_is_read_exactly(tmp_path):
    features = {"messages": datasets.List(datasets.Json()), "meta": {"more": datasets.Json()}}
    rows = [{"messages": [{"lat": 6.7216}, None, {"n": 2**63}], "meta": {"more": [0.7579544029403025, 0.69]}}]
    text = {"messages": [[cell and json.dumps(cell) for cell in row["messages"]] for row in rows]}
    text["meta"] = [{"more": json.dumps(row["meta"]["more"])} for row in rows]
    dataset = datasets.Dataset.from_dict(text, features=datasets.Features(features))
    dataset.save_to_disk(tmp_path / "saved")
    dataset.to_parquet(tmp_path / "rows.parquet")
    assert list(dataset) != rows  # as `datasets` reads it
    assert list(load_rows(tmp_path / "saved")) == rows
    assert list(load_rows(tmp_path / "rows.parquet")) == rows


def test_cells_of_csv_are_text(tmp_path):
    text = 'id,answer,more\n007,NA,1.0\n"1\n2","say ""hi""",\n\nnull,2024-01-05, x \n'
    rows = load_rows(write(tmp_path / "rows.csv", text))
    assert rows.to_list() == [
        {"id": "007", "answer": "NA", "more": "1.0"},
        {"id": "1\n2", "answer": 'say "hi"', "more": ""},
        {"id": "null", "answer": "2024-01-05", "more": " x "},
    ]
    assert load_rows(write(tmp_path / "long.csv", "a\n" + "x" * 200_000)).to_list() == [{"a": "x" * 200_000}]


@pytest.mark.parametrize(("ids", "kept"), [(["7", "-2"], [7, -2]), (["7", "x"], ["7", "x"]), (["7", ""], ["7", ""])])
def test_sample_ids_of_csv_are_integers_if_all_are(ids, kept, tmp_path):
    file = write(tmp_path / "rows.csv", "sample_id,a\n" + "".join(f"{i},b\n" for i in ids))
    assert load_rows(file)["sample_id"][:] == kept


def test_columns_that_are_not_needed_are_not_in_the_way(tmp_path):
    rows = [ROWS[0] | {"odd": 1}, ROWS[1] | {"odd": [{"x": 2**70}]}]
    file = write(tmp_path / "rows.jsonl", lines(rows))
    assert load_rows(file, columns=["completion", "prompt", "absent"]).to_list() == ROWS
    assert list(load_rows(file, columns=["prompt", "completion"], streaming=True)) == ROWS
    with pytest.raises(ValueError, match="none of the columns x is there; there are prompt, completion, odd"):
        load_rows(file, columns=["x"])
    for number, odd in enumerate([1, "x"]):  # shards that can't be read together
        datasets.Dataset.from_list([ROWS[number] | {"odd": [odd]}]).to_parquet(tmp_path / f"shards/{number}.parquet")
    assert load_rows(tmp_path / "shards", columns=["prompt", "completion"]).to_list() == ROWS
    assert load_rows(datasets.Dataset.from_list(rows[:1]), columns=["prompt"]).column_names == ["prompt"]
    with pytest.raises(ValueError, match="has none of the columns x; it has prompt, completion"):
        load_rows(datasets.Dataset.from_list(ROWS), columns=["x"])


# Faults


BAD_FILES = [
    ("rows.jsonl", '{"prompt": "a"}\n\n{"prompt": \n', ["rows.jsonl, line 3", "broken JSON"]),
    ("rows.json", '{"prompt": "a"}\n{"prompt" "a"}\n', ["rows.json, line 2", "broken JSON", "column 11"]),
    ("rows.json", '[\n{"prompt": "a"},\n{"prompt" "a"}]', ["rows.json, line 3", "broken JSON"]),
    ("rows.json", '[{"a": 1},]', ["line 1", "broken JSON"]),
    ("rows.json", '[{"a": 1}\n{"a": 2}]', ["line 2", "',' or ']'"]),
    ("rows.json", '[{"a": 1}]\n{"a": 2}', ["line 2", "after the end of the array"]),
    ("rows.jsonl", '{"a": 1}\n{"a": 2\n{"a": 3}\n', ["line 2", "has no end before the one that begins in line 3"]),
    ("rows.jsonl", '{"a": 1}\n{"a":\n{"a": 3}\n{"a": 4}', ["line 2", "before the one that begins in line 4"]),
    ("rows.jsonl", '{"a": 1}\n{"a": "x\n"}\n', ["line 2", "broken JSON"]),
    ("rows.jsonl", '{\n "a": 1,\n "b" 2\n}\n', ["line 3", "broken JSON"]),
    ("rows.jsonl", '{"prompt": "a"}\n17\n', ["line 2", "not an object but 17"]),
    ("rows.jsonl", '"text"', ["line 1", 'not an object but "text"']),
    ("rows.jsonl", '{"a": 1}\n{"a": {"b": 1, "b": 2}}', ["line 2", "'b' is there twice"]),
    ("rows.jsonl", '{"a": "x"}\n' * 25_000 + '{"a": ["\\ud800"]}', ["line 25001", "half of a surrogate"]),
    ("rows.jsonl", '{"a": 1}\n{"a": ' + "[" * 100_000, ["line 2", "nested too deep"]),
    ("rows.jsonl", '{"a": ' + "1" * 5000 + "}", ["line 1", "thousands of digits"]),
    ("rows.jsonl", b'{"prompt": "a"}\n{"prompt": "\xff"}\n', ["line 2", "byte 0xff is not UTF-8"]),
    ("rows.jsonl", '{"a": 1}'.encode("utf-16"), ["line 1", "byte 0xff is not UTF-8"]),
    ("rows.jsonl.gz", gzip.compress(b'{"a": 1}\n{"a"}'), ["rows.jsonl.gz, line 2", "broken JSON"]),
    ("rows.jsonl.gz", JSON, ["rows.jsonl.gz can't be unpacked", "Not a gzipped file"]),
    *((f"rows.jsonl.{ending}", pack(JSON)[:-9], [f"{ending} can't be unpacked"]) for ending, pack in PACK.items()),
    ("rows.csv", "a,b\n1,2\n3\n", ["rows.csv, line 3", "1 cells, but the header has 2"]),
    ("rows.csv", 'a,b\n"1\n2",3\n4,5,6\n', ["line 4", "3 cells"]),
    ("rows.csv", 'a\n"x"y\n', ["line 2", "broken CSV"]),
    ("rows.csv", 'a\n1\n"x\n\n', ["line 3", "broken CSV"]),
    ("rows.csv", "a,b,a\n1,2,3", ["line 1", "two columns have the name 'a'"]),
    ("rows.csv", b"a\n\n\xe9\n", ["line 3", "byte 0xe9"]),
    ("rows.parquet", "nonsense", ["rows.parquet", "Parquet"]),
    ("rows.arrow", "nonsense", ["rows.arrow", "Arrow"]),
    ("rows.txt", "a", ["'.txt'", ".jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow", ".gz, .bz2, .xz, .zst"]),
    ("rows.parquet.gz", "a", ["'.gz'", "accepted are"]),
]  # fmt: skip


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "words"), BAD_FILES, ids=[f"{n}-{bad[0]}" for n, bad in enumerate(BAD_FILES)]
)
def test_bad_files(name, content, words, streaming, tmp_path):
    write(tmp_path / name, content)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        list(load_rows(tmp_path / name, streaming=streaming))
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
@pytest.mark.parametrize("content", ["", "\n\n", None])
def test_no_rows(name, content, tmp_path):
    if content is None:
        content = "prompt,completion\n" if name == "rows.csv" else "[]"
    with pytest.raises(ValueError, match=f"{name}.* no rows"):
        load_rows(write(tmp_path / name, content))


def test_an_early_fault_is_found_without_reading_on(tmp_path, monkeypatch):
    monkeypatch.setattr(row_files, "_CHUNK", 1 << 12)
    rows = read_rows(write(tmp_path / "rows.jsonl", '{"a": 1\n' + '{"a": "xxxxxxx"}\n' * 200_000))
    tracemalloc.start()
    with pytest.raises(ValueError, match="line 1"):
        next(rows)
    assert tracemalloc.get_traced_memory()[1] < 500_000
    tracemalloc.stop()


def test_the_cache_folder_is_blamed_for_what_is_its_fault(tmp_path, monkeypatch):
    file, blocked = write(tmp_path / "rows.jsonl", JSON), write(tmp_path / "file", "")
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "rows.parquet")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", blocked / "cache")
    for path, streaming in ((file, False), (file, True), (tmp_path / "rows.parquet", False)):
        with pytest.raises(OSError, match=r"cache folder of `datasets` can't be made .*file/cache.*HF_DATASETS_CACHE"):
            load_rows(path, streaming=streaming)


def test_a_missing_file_of_save_to_disk_is_named(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path)
    next(tmp_path.glob("*.arrow")).unlink()
    with pytest.raises(ValueError, match=r"save_to_disk and is not complete.*data-00000-of-00001\.arrow"):
        load_rows(tmp_path)


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(ValueError, match=r"pipe\.jsonl is neither a file nor a folder"):
        load_rows(tmp_path / "pipe.jsonl")


@pytest.mark.parametrize(
    "name", ["nobody/nothing", "data/train.jsonl", "data/train.csv.gz", "/nowhere/at/all", "~/none"]
)
def test_missing(name):
    with pytest.raises(FileNotFoundError, match=f"'{name}' is neither a file or folder here nor"):
        load_rows(name)


# Folders


def left_out(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


FOLDERS = {
    "splits": (["train.jsonl", "test.jsonl", "LICENSE", "README.md", "dataset_info.json"], {"train": 1, "test": 1}, []),
    "no split": (["a.jsonl", "b.csv", "c.jsonl.gz", "d.parquet"], {"train": 4}, []),
    "of no split": (["train.jsonl", "more.jsonl"], {"train": 1}, ["more.jsonl is left out (neither"]),
    "shards": (["train-1.jsonl", "x_train_2.csv", "part-3.jsonl"], {"train": 2}, ["part-3.jsonl is left out"]),
    "upper case": (["TRAIN.JSONL", "Dev.Parquet", "Eval.CSV"], {"train": 1, "validation": 1, "test": 1}, []),
    "folders": (["train/a.jsonl", "train/b/c.tsv", "val/test.jsonl"], {"train": 2, "validation": 1}, []),
    "folders and files": (["train/a.jsonl", "test.jsonl"], {"train": 1, "test": 1}, []),
    "hub": (
        ["data/train_sft-00000-of-00002.parquet", "data/train_sft-00001-of-00002.parquet", "raw/train.jsonl"],
        {"train_sft": 2},
        ["raw/train.jsonl is left out (it is not among the files data/"],
    ),
    "hidden": (["a.jsonl", ".b.jsonl", ".cache/c.jsonl", "__d__/e.jsonl"], {"train": 1}, []),
    "unknown": (["train.jsonl", "notes.xlsx", "x.parquet.gz"], {"train": 1}, ["notes.xlsx is left", "x.parquet.gz"]),
    "metadata": (["a.parquet", "about.json"], {"train": 1}, ["about.json is left out (a .json next to other kinds"]),
    "two names": (["test-of-train.jsonl", "train.jsonl"], {"train": 2, "test": 1}, ["is in train and in test"]),
}  # fmt: skip


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("case", FOLDERS)
def test_every_file_of_a_folder_is_loaded_or_named(case, streaming, tmp_path, caplog):
    names, sizes, warnings = FOLDERS[case]
    for name in names:
        file, kind = tmp_path / name, format_of(name)
        if kind == "parquet":
            file.parent.mkdir(parents=True, exist_ok=True)
            datasets.Dataset.from_list([{"prompt": name}]).to_parquet(file)
        else:
            plain = json.dumps({"prompt": name}).encode() if kind == "json" else f"prompt\n{name}\n".encode()
            write(file, gzip.compress(plain) if name.endswith(".gz") else plain)
    for split, size in sizes.items():
        caplog.clear()
        rows = [row["prompt"] for row in load_rows(tmp_path, split=split, streaming=streaming)]
        assert len(rows) == size
        assert set(rows) <= set(names)
        said = left_out(caplog)
        assert len(said) == bool(warnings)
        assert all(warning in said[0] for warning in warnings)
    with pytest.raises(ValueError, match="has no split 'absent'"):
        load_rows(tmp_path, split="absent", streaming=streaming)


def test_slices_of_folders(tmp_path):
    write_jsonl(tmp_path / "train.jsonl")
    write_jsonl(tmp_path / "test.jsonl", ROWS[:1])
    write(tmp_path / "train-empty.jsonl", "")
    assert load_rows(tmp_path).to_list() == ROWS
    assert load_rows(tmp_path, split="test").to_list() == ROWS[:1]
    assert load_rows(tmp_path, split="train[1:]").to_list() == ROWS[1:]
    assert load_rows(tmp_path, split="train+test").to_list() == [*ROWS, ROWS[0]]
    assert load_rows(tmp_path, config_name="main").to_list() == ROWS  # so that a command for the hub's data set works
    assert load_rows(tmp_path / "train.jsonl", config_name="main").to_list() == ROWS


def test_kinds_of_files_are_joined_if_their_columns_agree(tmp_path):
    rows = [{"messages": TURNS, "n": 1}, {"messages": [*TURNS, {"role": "user", "content": "c"}], "n": 2}]
    write(tmp_path / "a.jsonl", lines(rows[:1]))
    datasets.Dataset.from_list(rows[1:]).to_parquet(tmp_path / "b.parquet")
    assert list(load_rows(tmp_path)) == rows
    assert list(load_rows(tmp_path, streaming=True)) == rows
    write(tmp_path / "a.jsonl", lines(ROWS))
    for streaming in (False, True):
        with pytest.raises(ValueError, match=r"a\.jsonl: completion, prompt; .*b\.parquet: messages, n"):
            load_rows(tmp_path, streaming=streaming)
    pq.write_table(pa.table({"n": pa.array([0], pa.timestamp("s"))}), tmp_path / "b.parquet")
    write(tmp_path / "a.jsonl", lines([{"n": 1}]))
    with pytest.raises(ValueError, match=r"different types .*a\.jsonl and .*b\.parquet"):
        load_rows(tmp_path)


def test_the_broken_file_of_a_folder_is_named(tmp_path):
    write_jsonl(tmp_path / "train.jsonl")
    write(tmp_path / "test.jsonl", '{"prompt": "a", "completion": "b"}\n{"prompt"')
    with pytest.raises(ValueError, match=r"test\.jsonl, line 2: broken JSON"):
        load_rows(tmp_path)
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "shards/a.parquet")
    write(tmp_path / "shards/b.parquet", b"PAR1")
    with pytest.raises(ValueError, match=r"b\.parquet can't be read as Parquet"):
        load_rows(tmp_path / "shards")


def test_a_folder_with_a_card(tmp_path, caplog):
    card = "---\nconfigs:\n- config_name: main\n  data_files:\n  - split: train\n    path: here/*.jsonl\n---\n"
    write(tmp_path / "README.md", card)
    write(tmp_path / "here/a.jsonl", JSON)
    write(tmp_path / "there/b.jsonl", "no rows")
    for streaming in (False, True):
        assert list(load_rows(tmp_path, config_name="main", streaming=streaming)) == ROWS
    assert not left_out(caplog)


def test_a_folder_without_rows(tmp_path):
    write(tmp_path / "notes.xlsx", "x")
    with pytest.raises(ValueError, match=r"holds no rows .* end in \.jsonl"):
        load_rows(tmp_path)


def test_links_to_folders_are_followed_once(tmp_path):
    write(tmp_path / "there/a.jsonl", JSON)
    (tmp_path / "here").mkdir()
    (tmp_path / "here/link").symlink_to(tmp_path / "there")
    (tmp_path / "there/loop").symlink_to(tmp_path / "here")
    assert load_rows(tmp_path / "here").to_list() == ROWS


# Data sets in memory, splits


def test_data_sets_pass_through():
    dataset = datasets.Dataset.from_list(ROWS)
    assert load_rows(dataset) is dataset
    assert load_rows(datasets.DatasetDict(dev=dataset), split="dev").to_list() == ROWS
    assert list(load_rows(dataset, streaming=True)) == ROWS


def test_splits_of_any_name():
    splits = datasets.DatasetDict(
        {"train-v1.0": datasets.Dataset.from_list(ROWS), "b": datasets.Dataset.from_list(ROWS)}
    )
    assert load_rows(splits, split="train-v1.0").to_list() == ROWS
    assert load_rows(splits, split="train-v1.0[1:]").to_list() == ROWS[1:]
    assert load_rows(splits, split="b[:50%]+train-v1.0[-1:]").to_list() == ROWS


@pytest.mark.parametrize("split", ["dev", "tr ain", "train[", "train[:x]"])
def test_missing_split(split):
    splits = datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS), test=datasets.Dataset.from_list(ROWS[:1]))
    with pytest.raises(ValueError, match=r"Available: train \(2 rows\), test \(1 rows\)"):
        load_rows(splits, split=split)


def test_transforms_are_refused_and_other_formats_are_views():
    dataset = datasets.Dataset.from_list(ROWS)
    changed = dataset.with_transform(lambda batch: {name: [text.upper() for text in batch[name]] for name in batch})
    splits = datasets.DatasetDict(train=changed, test=changed)
    for given, split in ((changed, "train"), (splits, "train"), (splits, "train[:1]"), (splits, "train+test")):
        with pytest.raises(ValueError, match=r"has a transform .*map\(transform, batched=True\)"):
            load_rows(given, split=split)
    with pytest.raises(ValueError, match="has a transform"):
        tokenize_rows(changed, make_tokenizer(), max_length=16)
    for kind in ("numpy", "torch", "pandas", "arrow"):
        assert load_rows(dataset.with_format(kind)).to_list() == ROWS


def test_other_objects_are_refused():
    with pytest.raises(TypeError, match="not list"):
        load_rows(ROWS)
    with pytest.raises(ValueError, match="no rows"):
        load_rows(datasets.Dataset.from_dict({"prompt": []}))


# Streams


def test_streams_are_refused_with_two_ways_out_unless_they_are_asked_for():
    stream = datasets.Dataset.from_list(ROWS).to_iterable_dataset()
    for given in (stream, datasets.IterableDatasetDict(train=stream)):
        with pytest.raises(TypeError, match=r"--streaming.*take\(n\)"):
            load_rows(given)
    assert load_rows(stream, streaming=True) is stream
    assert load_rows(datasets.IterableDatasetDict(dev=stream), split="dev", streaming=True) is stream


def test_slices_of_streams(tmp_path):
    rows = [{"n": n} for n in range(10)]
    write(tmp_path / "train.jsonl", lines(rows[:7]))
    write(tmp_path / "test.jsonl", lines(rows[7:]))
    expected = {"train": rows[:7], "train[:2]": rows[:2], "train[5:]": rows[5:7], "train[2:4]": rows[2:4],
                "train+test": rows, "train[6:] + test[:1]": rows[6:8], "train[4:2]": []}  # fmt: skip
    for split, part in expected.items():
        assert list(load_rows(tmp_path, split=split, streaming=True)) == part
    for split in ("dev", "train[-1:]", "train[:10%]", "train["):
        with pytest.raises(ValueError, match=r"there are train, test\..* NAME\[:n\]"):
            load_rows(tmp_path, split=split, streaming=True)


def test_a_stream_is_split_over_workers_by_file(tmp_path):
    for number in range(4):
        write(tmp_path / f"part-{number}.jsonl", lines([{"n": 10 * number + i} for i in range(3)]))
    stream = load_rows(tmp_path, streaming=True, columns=["n", "absent"])
    parts = [[row["n"] for row in split_dataset_by_node(stream, rank, 2)] for rank in range(2)]
    assert sorted(parts[0] + parts[1]) == [10 * number + i for number in range(4) for i in range(3)]
    assert stream.num_shards == 4
    position = iter(stream)
    assert [next(position)["n"] for _ in range(4)] == [0, 1, 2, 10]


def test_a_stream_reads_no_more_than_it_is_asked_for(tmp_path):
    file = write(tmp_path / "rows.jsonl", JSON + b'{"prompt": "x"}\n' * 100_000 + b"broken")
    stream = load_rows(file, streaming=True)
    assert list(stream.take(2)) == ROWS
    with pytest.raises(ValueError, match="line 100003: broken JSON"):
        list(stream)


# The cache


def test_a_file_is_read_again_only_when_it_has_changed(tmp_path, monkeypatch):
    file = write(tmp_path / "rows.jsonl", JSON)
    first = load_rows(file)
    with monkeypatch.context() as patch:
        patch.setattr("selfgen.data.loading.row_tables.read_rows", lambda file: pytest.fail("read again"))
        again = load_rows(file)
    assert again._fingerprint == first._fingerprint
    assert load_rows(file, columns=["prompt"])._fingerprint != first._fingerprint
    write(file, lines(ROWS[::-1]))
    os.utime(file, ns=(1, 1))
    assert load_rows(file).to_list() == ROWS[::-1]
    assert first.to_list() == ROWS


def test_a_file_that_grows_while_it_is_read_is_refused(tmp_path, cache, monkeypatch):
    file = write(tmp_path / "rows.jsonl", JSON)

    def read_and_grow(path):
        yield from read_rows(path)
        with open(path, "ab") as stream:
            stream.write(JSON)

    with monkeypatch.context() as patch:
        patch.setattr("selfgen.data.loading.row_tables.read_rows", read_and_grow)
        with pytest.raises(ValueError, match=r"rows\.jsonl changed while it was read"):
            load_rows(file)
    assert not list(cache.rglob("*.arrow"))
    assert len(load_rows(file)) == 3 * len(ROWS)


def _load(path: str, cache: str) -> tuple[int, str]:
    datasets.config.HF_DATASETS_CACHE = Path(cache)
    rows = load_rows(path)
    return len(rows), rows._fingerprint


def test_several_processes_at_once(tmp_path, cache):
    file = write(tmp_path / "rows.jsonl", lines(ROWS * 5000))
    with multiprocessing.get_context("fork").Pool(4) as pool:
        found = pool.starmap(_load, [(str(file), str(cache))] * 4)
    assert len(set(found)) == 1
    assert found[0][0] == 2 * 5000
    assert [path.name for path in cache.rglob("*.arrow*")] == ["rows.arrow"]


@pytest.mark.parametrize("form", ["lines", "array"])
def test_memory_does_not_grow_with_the_file(form, tmp_path, monkeypatch):
    monkeypatch.setattr(row_files, "_CHUNK", 1 << 16)
    monkeypatch.setattr("selfgen.data.loading.row_tables._BATCH_ROWS", 50)
    rows = [{"prompt": "x" * 1000, "messages": TURNS}]
    load_rows(write(tmp_path / "first.jsonl", lines(rows)))
    peaks = []
    for count in (1000, 4000):
        text = lines(rows * count) if form == "lines" else json.dumps(rows * count)
        file = write(tmp_path / f"{count}.json", text)
        tracemalloc.start()
        load_rows(file)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0] < 2_000_000
