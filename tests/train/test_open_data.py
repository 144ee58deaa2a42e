"""What --data may name: text, a folder of tokens, a mixture; and what is said of one that will not do."""

import errno
import json
from pathlib import Path

import numpy as np
import pytest

from zigzag_jax.train.data import open_data as opening
from zigzag_jax.train.data.dataset import META, SIDES, finish, read_dataset, unfinished, write_sides
from zigzag_jax.train.data.mixture import MixedStore
from zigzag_jax.train.data.open_data import open_data, tokens_digest
from zigzag_jax.train.data.store import open_dataset
from zigzag_jax.train.data.tokenizer import train_tokenizer
from zigzag_jax.train.errors import MachineError, UserError

TEXT = [f"document {n}\n" + "a ring is a line that comes home\n" * (n % 9) for n in range(40)]
TOKENIZER = train_tokenizer(TEXT, characters=sum(map(len, TEXT)), vocab_size=300)
OTHER = train_tokenizer(TEXT, characters=sum(map(len, TEXT)), vocab_size=290)


def tokens(folder: Path, seed: int, tokenizer=TOKENIZER) -> Path:
    """A folder of random tokens."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(seed)
    with write_sides(folder, tokenizer) as writers:
        for n in range(60):
            writers[n % 6 == 0].add(draw.integers(1, 280, 30 + n))
    finish(folder, tokenizer, writers, "")
    return folder


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two folders of tokens, nothing else, and a cache that nobody may use."""
    monkeypatch.setenv("ZIGZAG_CACHE", "/proc/zigzag")
    tokens(tmp_path / "a", 0)
    tokens(tmp_path / "sub" / "b", 1)
    return tmp_path


def mixture(place: Path, *sources: object) -> Path:
    (place / "mix.json").write_text(json.dumps({"sources": sources}))
    return place / "mix.json"


A, B = {"path": "a", "weight": 3}, {"path": "sub/b", "weight": 1.5}


def test_a_folder_of_tokens_is_opened_and_no_text_read(place: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(opening, "open_dataset", None)
    found = open_data(place / "a", None)
    assert found.folder == place / "a"
    assert found.tokenizer.to_str() == TOKENIZER.to_str()
    assert (found.vocab_size, found.end_of_document) == (300, 0)
    assert (found.train.size, len(found.train.lengths), len(found.held_out.lengths)) == (3050, 50, 10)
    assert open_data(place / "a", place / "a" / "tokenizer.json").digest == found.digest


def test_the_same_tokenizer_in_another_file_will_do(place: Path):
    parts = json.loads(TOKENIZER.to_str())
    parts |= {"truncation": {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}}
    (place / "same.json").write_text(json.dumps(parts, separators=(",", ":")))
    assert open_data(place / "a", place / "same.json").folder == place / "a"
    OTHER.save(str(place / "other.json"))
    with pytest.raises(UserError, match=r"^tokenizer: must be the one that .*a was tokenised with.*other\.json"):
        open_data(place / "a", place / "other.json")
    with pytest.raises(
        UserError, match=r"^tokenizer: must be the one that .*sub/b was tokenised with|^tokenizer: .*a was"
    ):
        open_data(mixture(place, A, B), place / "other.json")


def cut_short(file: Path):
    file.write_bytes(file.read_bytes()[:-8])


def damage_meta(file: Path, **values: object):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("file", "damage", "said"),
    [
        ("train.tokens", cut_short, r"train\.tokens must have 6100 bytes, got 6092"),
        ("held_out.offsets", cut_short, r"held_out\.offsets must have 88 bytes, got 80"),
        ("held_out.tokens", Path.unlink, r"No such file .*held_out\.tokens"),
        (
            "train.offsets",
            lambda file: file.write_bytes(bytes(file.stat().st_size)),
            r"train\.offsets must end with 3050",
        ),
        ("meta.json", cut_short, "meta.json: "),
        ("meta.json", Path.unlink, "No such file"),
        ("meta.json", lambda file: damage_meta(file, format="zigzag_jax tokens 1"), "must say format"),
        ("meta.json", lambda file: damage_meta(file, dtype="x"), "x"),
        ("tokenizer.json", lambda file: OTHER.save(str(file)), r"tokenizer\.json must have 300 tokens, got 290"),
        ("tokenizer.json", Path.unlink, r"must be a tokenizer\.json that exists"),
    ],
)
def test_a_damaged_folder_is_named_and_never_taken_for_text(place: Path, file: str, damage, said: str):
    damage(place / "a" / file)
    with pytest.raises(
        UserError, match=rf"^data: must hold whole tokens \(.*{said}.*\); tokenise the text again, got .*a$"
    ):
        open_data(place / "a", None)
    with pytest.raises(UserError, match=r"^data: must hold whole tokens"):
        open_data(mixture(place, A, B), None)


def test_tokens_that_are_not_made_to_their_end_are_told_apart_from_none(place: Path):
    unfinished(place / "c").mkdir()
    with pytest.raises(UserError, match=r"^data: must be tokenised to its end .*the same command"):
        open_data(place / "c", None)
    with pytest.raises(UserError, match=r"^data: must be a file or a folder that exists"):
        open_data(place / "d", None)


def test_text_still_goes_through_the_cache(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ZIGZAG_CACHE", str(place / "cache"))
    (place / "text").mkdir()
    (place / "text" / "meta.json").write_text(json.dumps({"text": "no tokens in this folder"} | dict.fromkeys(TEXT, 1)))
    found = open_data(place / "text", place / "a")
    assert found.digest == open_dataset(place / "text", place / "a" / "tokenizer.json").digest
    assert open_data(found.folder, None).digest == found.digest  # what the cache holds is a folder of tokens too


def test_a_mixture_is_its_sources_with_their_weights(place: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir("/")
    found = open_data(mixture(place, A, B), place / "a")
    parts = [read_dataset(place / name, field="", remedy="") for name in ("a", "sub/b")]
    for side in SIDES:
        store = getattr(found, side)
        assert isinstance(store, MixedStore)
        assert (store.weights, store.names) == ((3, 1.5), (str(place / "a"), str(place / "sub/b")))
        whole = np.concatenate([getattr(part, side).tokens for part in parts])
        np.testing.assert_array_equal(store.read(0, store.size), whole)
    assert (found.vocab_size, found.end_of_document, found.folder) == (300, 0, place / "a")
    digests = {found.digest, open_data(mixture(place, A, B | {"weight": 2}), None).digest}
    digests |= {open_data(mixture(place, *order), None).digest for order in ((B, A), (A,))}
    assert len(digests) == 4
    assert open_data(mixture(place, A | {"path": str(place / "a")}, B), None).digest == found.digest


@pytest.mark.parametrize(
    ("sources", "said"),
    [
        ([], "^data: a mixture must have a source, got .*mix.json"),
        (
            [A, {"path": "nowhere", "weight": 1}],
            "^data: each source of .*mix.json must be a folder of tokens, .*nowhere",
        ),
        ([A, A | {"path": "sub/../a"}], "^data: each source of a mixture must be named once"),
        *(
            ([A, B | {"weight": weight}], "^data: the weight of .*sub/b in .*mix.json must be a positive number, got")
            for weight in (0, -1, "1", None, True, float("inf"), float("nan"))
        ),
        ([A, {"path": "sub/b"}], r"^data: a \.json file must be a mixture.*KeyError: 'weight'"),
        ([{"weight": 1}], r"^data: a \.json file must be a mixture.*KeyError: 'path'"),
        ([A | {"share": 1}], r"^data: a \.json file must be a mixture.*a source has no share"),
        (["a"], r"^data: a \.json file must be a mixture"),
    ],
)
def test_a_mixture_that_will_not_do_is_told(place: Path, sources: list, said: str):
    with pytest.raises(UserError, match=said):
        open_data(mixture(place, *sources), None)


@pytest.mark.parametrize("text", ["{not json", "[]", "{}", '{"sources": 3}', "\xff"])
def test_a_json_file_that_is_no_mixture_is_told(place: Path, text: str):
    (place / "x.json").write_text(text, "latin-1")
    with pytest.raises(UserError, match=r'^data: a \.json file must be a mixture, \{"sources": \[\{"path"'):
        open_data(place / "x.json", None)


def test_what_processes_compare_is_the_tokens_and_the_weights(place: Path):
    folders = place / "a", place / "sub" / "b"
    first, second = map(tokens_digest, folders)
    assert first.split("digest")[1] != second.split("digest")[1]
    before = tokens_digest(mixture(place, A, B))
    assert before == tokens_digest(mixture(place, A, B))
    assert before != tokens_digest(mixture(place, A, B | {"weight": 2}))
    meta = json.loads((folders[1] / META).read_text())
    (folders[1] / META).write_text(json.dumps(meta | {"digest": "of other tokens"}))
    assert tokens_digest(folders[1]) != second
    assert tokens_digest(mixture(place, A, B)) != before
    (folders[1] / META).write_text("{")
    assert META in tokens_digest(folders[1])
    assert [tokens_digest(None), tokens_digest(place / "text.txt")] == ["None", str(place / "text.txt")]


def test_sources_of_two_tokenizers_are_refused(place: Path):
    tokens(place / "c", 2, OTHER)
    with pytest.raises(
        UserError, match=r"^data: the sources of .*mix\.json must have one tokenizer, .*another in .*/c"
    ):
        open_data(mixture(place, A, B, {"path": "c", "weight": 1}), None)


def test_a_host_whose_storage_is_away_is_not_one_with_other_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def away(folder: Path) -> dict:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(opening, "read_meta", away)
    with pytest.raises(MachineError, match="storage does not answer"):
        opening._digest(tmp_path)


def test_tokens_that_storage_does_not_show_are_not_taken_for_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def away(path: Path) -> bytes:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(Path, "read_bytes", away)
    with pytest.raises(MachineError, match="storage does not answer"):
        open_data(tmp_path, None)
