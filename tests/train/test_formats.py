"""Files as documents: any cut into pieces gives the same ones, and what is wrong is named with its place."""

import gzip
import json
import sys
from pathlib import Path

import pytest

from zigzag_jax.train.data.corpus import documents
from zigzag_jax.train.data.formats import Piece, pieces, read
from zigzag_jax.train.errors import UserError

TEXTS = [f"document {n}: ä ring {'of home ' * (n % 9)}\n" for n in range(40)]


def lines(texts=TEXTS, field="text"):
    return b"".join(json.dumps({"id": 1, field: text}, ensure_ascii=False).encode() + b"\n" for text in texts)


def write_parquet(path: Path, texts=TEXTS, field="text", groups=7):
    pa = pytest.importorskip("pyarrow", reason="not in the plain trainer: the extra data brings it")
    from pyarrow import parquet

    table = pa.table({"id": range(len(texts)), field: texts})
    parquet.write_table(table, path, row_group_size=-(-len(texts) // groups))


def all_of(path, most, field="text"):
    cut = pieces(path, most)
    return [text for piece in cut for text in read(piece, field)], len(cut)


@pytest.mark.parametrize("ending", [b"", b"\n", b"\n\n \n", b'\n{"text": " "}\n'], ids=repr)
def test_jsonl_may_be_cut_anywhere(tmp_path: Path, ending: bytes):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines()[:-1].replace(b"\n", b"\r\n", 3) + ending)
    size = path.stat().st_size
    counts = set()
    for most in [*range(1, 60), *range(60, size, 97), size, 2 * size]:
        texts, count = all_of(path, most)
        assert texts == TEXTS
        counts.add(count)
    assert {1, size} <= counts
    assert sum(piece.size for piece in pieces(path, size // 4)) == pytest.approx(size, abs=4)


def test_parquet_is_cut_between_row_groups(tmp_path: Path):
    path = tmp_path / "a.parquet"
    write_parquet(path)
    size = path.stat().st_size
    found = [all_of(path, most) for most in (1, size // 7, size // 2, 2 * size)]
    assert [texts for texts, _ in found] == [TEXTS] * 4
    assert [count for _, count in found] == [7, 7, 2, 1]


def test_a_folder_of_all_kinds_is_one_corpus(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS[:10]))
    with gzip.open(tmp_path / "b.jsonl.gz", "wb") as out:
        out.write(lines(TEXTS[10:20]))
    write_parquet(tmp_path / "c.parquet", TEXTS[20:39])
    (tmp_path / "d.txt").write_text(TEXTS[39])
    assert list(documents(tmp_path)) == TEXTS
    assert pieces(tmp_path / "b.jsonl.gz", 10) == [
        Piece(tmp_path / "b.jsonl.gz", size=(tmp_path / "b.jsonl.gz").stat().st_size)
    ]


def test_the_text_may_have_another_name(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(lines(field="content"))
    write_parquet(tmp_path / "a.parquet", field="content")
    for name in ("a.jsonl", "a.parquet"):
        assert list(read(Piece(tmp_path / name), "content")) == TEXTS


def test_a_bad_line_is_named_whatever_piece_it_is_in(tmp_path: Path):
    bad = lines(TEXTS[:30]) + b'{"text": 7}\n' + lines(TEXTS[30:])
    (tmp_path / "a.jsonl").write_bytes(bad)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(bad))
    for path, most in ((tmp_path / "a.jsonl", 100), (tmp_path / "a.jsonl", 1 << 20), (tmp_path / "a.jsonl.gz", 9)):
        with pytest.raises(UserError, match=rf'^data: each JSONL line .* "text", got .*{path.name}:31$'):
            all_of(path, most)


def test_parquet_that_will_not_do_is_named(tmp_path: Path):
    path = tmp_path / "a.parquet"
    write_parquet(path, [*TEXTS[:25], None, *TEXTS[25:]])
    with pytest.raises(UserError, match=r'^data: each row must have a string "text", got .*a\.parquet row 25$'):
        all_of(path, 100)
    with pytest.raises(
        UserError, match=r"^text-field: must name a column of strings of a\.parquet, which has text, got"
    ):
        all_of(path, 100, "id")
    whole = path.read_bytes()
    for damage in (whole[:-5], whole[: len(whole) // 2], whole[:20] + bytes(500) + whole[520:], b""):
        path.write_bytes(damage)
        with pytest.raises(UserError, match=r"^data: must be a whole parquet file .*a\.parquet"):
            all_of(path, 1 << 20)


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for most in (1, 100):
        with pytest.raises(UserError, match=r"^data: needs pyarrow .*zigzag_jax\[data\]"):
            all_of(tmp_path / "a.parquet", most)


@pytest.mark.parametrize("damage", [lambda x: x[:-9], lambda x: b"no" + x, lambda x: x[:30] + b"\0" * 30 + x[60:]])
def test_a_damaged_gzip_file_is_named(tmp_path: Path, damage):
    (tmp_path / "a.jsonl.gz").write_bytes(damage(gzip.compress(lines())))
    with pytest.raises(UserError, match=r"^data: must be a whole gzip file .*a\.jsonl\.gz"):
        list(read(Piece(tmp_path / "a.jsonl.gz")))


def test_what_cannot_be_read_is_named(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"fine\xff")
    with pytest.raises(UserError, match=r"^data: must be UTF-8 text, got .*a\.txt \(byte 4\)"):
        list(read(Piece(tmp_path / "a.txt")))
    for name in ("gone.txt", "gone.jsonl", "gone.parquet"):
        with pytest.raises(UserError, match=r"^data: must be readable \(No such file"):
            all_of(tmp_path / name, 1)
        with pytest.raises(UserError, match=r"^data: (must be readable \(.*No such file|needs pyarrow)"):
            list(read(Piece(tmp_path / name)))
