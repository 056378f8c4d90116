import sys

import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest

from titan_data import columnar
from titan_data.columnar import arrow_parts, parquet_parts
from titan_data.errors import DataError, MissingPackageError
from titan_data.records import text_of

ROWS = 300
TEXTS = [f"text {i} 東京\n" * (i % 5) for i in range(ROWS)]
TABLE = pyarrow.table({"id": range(ROWS), "text": TEXTS, "messages": [[{"role": "user"}]] * ROWS})


def parquet(path, table):
    pyarrow.parquet.write_table(table, path, row_group_size=70)


def arrow_file(path, table):
    with pyarrow.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=70)


def arrow_stream(path, table):
    with pyarrow.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=70)


def feather(path, table):
    pyarrow.feather.write_feather(table, path, compression="lz4", chunksize=70)


WRITERS = {
    "parquet": (parquet, parquet_parts),
    "arrow file": (arrow_file, arrow_parts),
    "arrow stream": (arrow_stream, arrow_parts),
    "feather": (feather, arrow_parts),
}


@pytest.fixture(params=WRITERS)
def parts_of(request, tmp_path, source_file):
    write, parts = WRITERS[request.param]

    def parts_of(table=TABLE, text=text_of("text", None), damage=None):  # noqa: B008
        path = tmp_path / "table"
        write(path, table)
        if damage is not None:
            path.write_bytes(damage(path.read_bytes()))
        return parts(source_file(path), text)

    parts_of.layout = request.param
    return parts_of


def test_each_row_is_a_document(parts_of, documents):
    parts = parts_of()
    assert documents(parts) == TEXTS
    assert len(parts) == 1
    assert parts[0].size_bytes > 0


def test_parts_hold_consecutive_row_groups_and_every_row_once(parts_of, documents, monkeypatch):
    monkeypatch.setattr(columnar, "PART_BYTES", 1)
    parts = parts_of()
    assert len(parts) == (1 if parts_of.layout == "arrow stream" else 5)
    assert documents(parts) == TEXTS
    assert documents(parts[-1:]) == TEXTS[-len(documents(parts[-1:])) :]


def test_records_have_all_columns_and_know_their_row(parts_of, monkeypatch):
    monkeypatch.setattr(columnar, "PART_BYTES", 1)
    records = [record for part in parts_of() for record in part.records()]
    assert records[299].fields == {"id": 299, "text": TEXTS[299], "messages": [{"role": "user"}]}
    assert records[299].place.endswith("table, row 299")
    assert len(records) == ROWS


def test_only_the_columns_asked_for_are_read(parts_of):
    (part,) = parts_of()
    assert next(part._records(("text",))).fields == {"text": ""}


def test_a_template_takes_several_columns(parts_of, documents):
    assert documents(parts_of(text=text_of("", "{id}:{text}")))[1] == f"1:{TEXTS[1]}"


def test_a_missing_column_is_named(parts_of, documents):
    with pytest.raises(
        DataError, match=r"table: no column 'body'; it has 'id', 'text', 'messages'\. .*data\.text_field"
    ):
        documents(parts_of(text=text_of("body", None)))


def test_a_row_without_text_is_refused_with_its_place(parts_of, documents):
    texts = [*TEXTS[:100], None, *TEXTS[101:]]
    with pytest.raises(DataError, match=r"table, row 100: field 'text' holds null"):
        documents(parts_of(pyarrow.table({"text": texts})))


def test_text_that_is_not_utf8_is_refused_with_its_place(parts_of, documents):
    column = pyarrow.array([b"fine"] * 140 + [b"\xe9"] + [b"fine"] * 20, pyarrow.binary()).view(pyarrow.string())
    with pytest.raises(DataError, match="table, row 140: text that is not UTF-8"):
        documents(parts_of(pyarrow.table({"text": column})))


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda _: b"text",
    ],
    ids=["last byte", "half", "empty", "other"],
)
def test_a_file_that_is_not_whole_is_refused(parts_of, documents, damage):
    with pytest.raises(DataError, match=r"table is not a whole (Parquet|Arrow) file"):
        documents(parts_of(damage=damage))


def test_damage_inside_is_refused(tmp_path, source_file, documents):
    pyarrow.parquet.write_table(TABLE, tmp_path / "table", write_page_checksum=True, compression="none")
    content = bytearray((tmp_path / "table").read_bytes())
    middle = content.index(b"text 7")
    content[middle : middle + 4] = b"TEXT"
    (tmp_path / "table").write_bytes(content)
    with pytest.raises(DataError, match="table is not a whole Parquet file"):
        documents(parquet_parts(source_file(tmp_path / "table"), text_of("text", None)))


def test_without_its_package_the_extra_is_named(tmp_path, source_file, monkeypatch):
    parquet(tmp_path / "table", TABLE)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MissingPackageError, match=r"titan-data\[parquet\]"):
        parquet_parts(source_file(tmp_path / "table"), text_of("text", None))
