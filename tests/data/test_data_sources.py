"""Files of every format: the same rows from each, any row without reading the others, changes noticed."""

import json
import os
import pickle

import pytest
from data_helpers import ask, paint, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from onward.cache import cache_directory
from onward.data import columns
from onward.data.array import scan_array
from onward.data.encode import load_encoder
from onward.data.jsonl import JsonlFile
from onward.data.prepare import ResolvedSource, prepare
from onward.data.samples import BadSample
from onward.data.sources import find_files, open_rows
from onward.errors import DamageError, InputError, PlanError

ROWS = [ask(f"Question {i}?", "a" * (i % 7 + 1)) for i in range(23)]


def write_parquet(path, rows, **options):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    return path


def write_saved(path, rows, **options):
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows).save_to_disk(path, **options)
    return path


def write_array(path, rows, **options):
    path.write_text(json.dumps(rows, **options))
    return path


def as_shards(path, rows):
    path.mkdir()
    write_rows(path / "b.jsonl", rows[10:])
    write_rows(path / "a.jsonl", rows[:10])
    return path / "*.jsonl"


FORMATS = {
    "lines": lambda path, rows: write_rows(path / "d.jsonl", rows),
    "array": lambda path, rows: write_array(path / "d.json", rows),
    "indented array": lambda path, rows: write_array(path / "d.json", rows, indent=2),
    "lines called json": lambda path, rows: write_rows(path / "d.json", rows),
    "parquet": lambda path, rows: write_parquet(path / "d.parquet", rows, row_group_size=4),
    "saved dataset": lambda path, rows: write_saved(path / "d", rows, num_shards=3),
    "shards": lambda path, rows: as_shards(path / "d", rows),
}


@pytest.mark.parametrize("form", FORMATS)
def test_the_same_rows_from_every_format(tmp_path, form):
    path = FORMATS[form](tmp_path, ROWS)
    file = open_rows(path, path.name)
    assert len(file) == len(ROWS)
    assert [file.row(i) for i in range(len(file))] == ROWS
    assert [pickle.loads(pickle.dumps(file)).row(i) for i in (22, 0, 11)] == [ROWS[22], ROWS[0], ROWS[11]]
    assert len({file.origin(i).sample_id for i in range(len(file))}) == len(ROWS)
    assert set(file.contents) == set(find_files(path))
    assert all(file.origin(i).folder.is_dir() for i in (0, 22))


@pytest.mark.parametrize("form", FORMATS)
def test_a_file_that_changes_while_it_is_used_is_damage(tmp_path, form):
    path = FORMATS[form](tmp_path, ROWS)
    file = open_rows(path, path.name)
    file.row(3)
    changed = find_files(path)[0]
    changed.write_bytes(changed.read_bytes() + b"\n")
    with pytest.raises(DamageError, match="changed while it was in use"):
        file.row(3)


def test_line_numbers_of_an_array(tmp_path):
    path = write_array(tmp_path / "d.json", [{"a": 1}, {"b": [2]}], indent=1)
    file = open_rows(path, "d.json")
    assert [file.origin(i).where.rsplit(":", 1)[1] for i in range(2)] == ["2", "5"]
    assert open_rows(write_array(tmp_path / "e.json", []), "e.json").__len__() == 0


TEXTS = st.text(alphabet='\\"[]{},:\n a\u00e9', max_size=9)
VALUES = st.recursive(TEXTS | st.none(), lambda inner: st.lists(inner, max_size=3), max_leaves=4)
ARRAYS = st.lists(st.dictionaries(TEXTS, VALUES, max_size=3), max_size=9)


@settings(max_examples=60, deadline=None)
@given(ARRAYS, st.sampled_from([None, 1]), st.sampled_from([1, 2, 3, 7, 64]))
def test_any_array_is_scanned_right_in_chunks_of_any_size(tmp_path_factory, rows, indent, chunk):
    path = write_array(tmp_path_factory.mktemp("array") / "d.json", rows, indent=indent, ensure_ascii=False)
    from onward.data import array

    before, array.CHUNK = array.CHUNK, chunk
    try:
        starts, lines, _ = scan_array(path)
    finally:
        array.CHUNK = before
    data = path.read_bytes()
    found = [json.JSONDecoder().raw_decode(data[start:].decode())[0] for start in starts.tolist()]
    assert found == rows
    assert lines.tolist() == [data[:start].count(b"\n") + 1 for start in starts.tolist()]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b'[{"a": 1}', "is not closed"),
        (b'[{"a": "1}]', "is not closed"),
        (b"[1, 2]", "no objects"),
        (b'[{"a": 1}, 2]', "no objects"),
        (b'[{"a": 1}] [{"a": 1}]', "is not closed"),
    ],
)
def test_damaged_arrays(tmp_path, data, reason):
    (tmp_path / "d.json").write_bytes(data)
    with pytest.raises(PlanError, match=reason):
        open_rows(tmp_path / "d.json", "d.json")


def test_a_bad_element_of_an_array_is_one_bad_row(tmp_path):
    (tmp_path / "d.json").write_bytes(b'[{"a": 1}, {"a": tru}, {"a": 3}]')
    file = open_rows(tmp_path / "d.json", "d.json")
    assert (file.row(0), file.row(2)) == ({"a": 1}, {"a": 3})
    with pytest.raises(BadSample, match="not JSON"):
        file.row(1)


def test_a_row_of_parquet_costs_its_row_group(tmp_path, monkeypatch):
    from pyarrow import parquet

    path = write_parquet(tmp_path / "d.parquet", ROWS * 40, row_group_size=10)
    read = []
    real = parquet.ParquetFile.read_row_group
    monkeypatch.setattr(
        parquet.ParquetFile, "read_row_group", lambda self, i, **options: read.append(i) or real(self, i, **options)
    )
    file = open_rows(path, "d.parquet")
    assert file.row(828) == (ROWS * 40)[828] and file.row(825) == (ROWS * 40)[825]
    assert read == [82]


def test_large_row_groups_are_unpacked_once_and_the_copy_is_never_trusted_unread(tmp_path, monkeypatch):
    """The copy may be deleted, cut off or altered: it is made again, and says the same."""
    monkeypatch.setattr(columns, "LARGE_GROUP", 100)
    monkeypatch.setattr(columns, "PIECE", 5)
    path = write_parquet(tmp_path / "d.parquet", ROWS)
    made = []
    real = columns._parquet
    monkeypatch.setattr(columns, "_parquet", lambda file: made.append(file) or real(file))

    def rows():
        made.clear()
        file = open_rows(path, "d.parquet")
        assert [file.row(i) for i in range(len(file))] == ROWS
        return len(made) - 1  # one looks at the row groups

    assert [rows(), rows()] == [1, 0]
    (copy,) = [file for file in (cache_directory() / "rows").iterdir() if not file.suffix]
    for damage in (
        lambda: copy.unlink(),
        lambda: cut(copy),
        lambda: flip(copy),
        lambda: copy.with_suffix(".digest").unlink(),
    ):
        damage()
        assert [rows(), rows()] == [1, 0]


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_no_room_for_a_copy_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(columns, "LARGE_GROUP", 100)
    path = write_parquet(tmp_path / "d.parquet", ROWS)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ONWARD_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"row groups are too large(.|\n)*row_group_size=1000"):
        open_rows(path, "d.parquet")


def test_nulls_of_columns_were_not_there(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
        {
            "messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "tool": {"x": 1}}],
            "id": 3,
        },
    ][::-1]
    file = open_rows(write_parquet(tmp_path / "d.parquet", rows), "d.parquet")
    assert [file.row(0), file.row(1)] == rows


def test_images_inside_parquet(tmp_path, llava_model):
    encoder = load_encoder(llava_model, max_length=99, overlong="error", loss_on="assistant", date="2026-01-31")
    pictures = [paint(tmp_path / f"{colour}.png", colour).read_bytes() for colour in ("red", "blue")]
    rows = [{"question": "?", "answer": "A", "image": {"bytes": picture, "path": None}} for picture in pictures]
    path = write_parquet(tmp_path / "d.parquet", rows)
    data = prepare([ResolvedSource(path)], encoder, on_bad_sample="stop")
    file = data.sources[0].file
    samples = [encoder.encode(file.row(i), file.origin(i)) for i in range(2)]
    assert samples[0].images["pixel_values"].mean((0, 2, 3)).argmax() == 0
    assert samples[1].images["pixel_values"].mean((0, 2, 3)).argmax() == 2


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: path / "none.jsonl", "no such data file"),
        (lambda path: path / "*.jsonl", "no such data file"),
        (lambda path: path, "no dataset that save_to_disk wrote"),
        (lambda path: write_rows(path / "d.csv", []), r"\.csv files are not read"),
        (lambda path: write_rows(path / "d.jsonl.gz", []), r"\.gz files are not read"),
        (lambda path: write_rows(path / "d.parquet", ROWS), "cannot be read as parquet"),
        (lambda path: write_rows(path / "d.arrow", ROWS), "cannot be read as arrow"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_reason(tmp_path, make, reason):
    with pytest.raises(PlanError, match=reason):
        open_rows(make(tmp_path), "d")


def test_saved_datasets_that_cannot_be_read(tmp_path):
    import datasets

    splits = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS)})
    splits.save_to_disk(tmp_path / "d")
    with pytest.raises(PlanError, match="several datasets: test, train") as caught:
        open_rows(tmp_path / "d", "d")
    assert str(tmp_path / "d" / "test") in caught.value.hint
    assert len(open_rows(tmp_path / "d" / "train", "train")) == len(ROWS)
    state = json.loads((tmp_path / "d/train/state.json").read_text())
    for files, reason in (
        ([{"filename": "../../x.arrow"}], "names no data files"),
        ([{"filename": "x.arrow"}], "is missing"),
    ):
        (tmp_path / "d/train/state.json").write_text(json.dumps({**state, "_data_files": files}))
        with pytest.raises(PlanError, match=reason):
            open_rows(tmp_path / "d/train", "d")


def test_a_chosen_subset_saved_to_disk_is_what_was_chosen(tmp_path):
    import datasets

    datasets.Dataset.from_list(ROWS).select([5, 3]).save_to_disk(tmp_path / "d")
    file = open_rows(tmp_path / "d", "d")
    assert [file.row(i) for i in range(len(file))] == [ROWS[5], ROWS[3]]


def test_jsonl_is_still_jsonl(tmp_path):
    assert isinstance(open_rows(write_rows(tmp_path / "d.jsonl", ROWS), "d"), JsonlFile)
