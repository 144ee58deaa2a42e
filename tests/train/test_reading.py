"""Which checkpoint is read, whatever fails: nothing is given up for what a machine or its cache did."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import jax
import pytest
from votes import Votes, alone

from zigzag_jax.train.errors import MachineError, UserError
from zigzag_jax.train.reading import Fault, Found, UnseenError, fault_of, read_newest, reason, steps_in

STALE = OSError(errno.ESTALE, os.strerror(errno.ESTALE))
EIO = ValueError(
    "UNKNOWN: Error reading \"w\": Error reading local file \"x\" [tensorstore_spec='{}'] [os_error_code='5']"
)
LOST = ValueError("DATA_LOSS: Error decoding manifest: Expected to read 17 bytes")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for step in (4, 8):
        (tmp_path / str(step)).mkdir()
        (tmp_path / str(step) / "data").write_text(f"state {step}")
    for name in ("9.corrupt", "12.orbax-checkpoint-tmp"):
        (tmp_path / name).mkdir()
    (tmp_path / "16").touch()  # no folder
    return tmp_path


class Reading:
    """Reads the files of `folder`; reads of step 8 raise `errors` first, one after another, an endless last one."""

    def __init__(self, folder: Path, *errors: Exception, endless: bool = False) -> None:
        self.folder, self.errors, self.endless, self.tries = folder, list(errors), endless, 0

    def __call__(self, step: int) -> str:
        if step == 8:
            self.tries += 1
            if self.errors:
                raise self.errors[0] if self.endless and len(self.errors) == 1 else self.errors.pop(0)
        return (self.folder / str(step) / "data").read_text()


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.mark.parametrize(
    ("error", "fault", "words"),
    [
        (OSError(errno.EIO, "Input/output error"), Fault.MACHINE, "Input/output error"),
        (TimeoutError(errno.ETIMEDOUT, "Connection timed out"), Fault.MACHINE, "Connection timed out"),
        (PermissionError(errno.EACCES, "Permission denied"), Fault.MACHINE, "Permission denied"),
        (STALE, Fault.MACHINE, "Stale file handle"),
        (EIO, Fault.MACHINE, "Input/output error"),
        (ValueError("DEADLINE_EXCEEDED: x"), Fault.MACHINE, "DEADLINE_EXCEEDED: x"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), Fault.MACHINE, "RESOURCE_EXHAUSTED: Out of memory"),
        (MemoryError(), Fault.MACHINE, "MemoryError"),
        (LOST, Fault.CONTENT, "DATA_LOSS: Error decoding manifest: Expected to read 17 bytes"),
        (ValueError("NOT_FOUND: x [os_error_code='2']"), Fault.CONTENT, "No such file or directory"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), Fault.CONTENT, "No such file or directory"),
        (FileNotFoundError("subdirectory not found"), Fault.CONTENT, "subdirectory not found"),
        (json.JSONDecodeError("Expecting value", "", 0), Fault.CONTENT, "Expecting value: line 1 column 1 (char 0)"),
        (KeyError("key_type"), Fault.CONTENT, "'key_type'"),
        (UnseenError("process 1 does not see it"), Fault.UNSEEN, "process 1 does not see it"),
    ],
    ids=str,
)
def test_whose_fault_it_is(error: Exception, fault: Fault, words: str):
    assert fault_of(error) is fault
    assert reason(error) == words


@pytest.mark.parametrize("cause", [EIO, LOST], ids=["machine", "content"])
def test_what_orbax_wraps_is_unwrapped(cause: Exception):
    error = Exception("Encountered error while reading array index: (slice(0, 2, 1),)")
    assert fault_of(error) is Fault.MACHINE
    error.__cause__ = cause
    assert (fault_of(error), reason(error)) == (fault_of(cause), reason(cause))


def test_only_whole_checkpoints_count(folder: Path):
    assert steps_in(folder) == {4, 8}
    assert steps_in(folder / "none") == set()
    assert read_newest(folder / "none", Reading(folder), alone(), print) is None


@pytest.mark.parametrize("error", [STALE, EIO], ids=["stale", "tensorstore"])
def test_what_the_machine_failed_at_is_read_again(folder: Path, said: list[str], error: Exception):
    read = Reading(folder, error, error)
    assert read_newest(folder, read, alone(), said.append) == Found(8, "state 8", {})
    assert read.tries == 3
    assert said == [f"checkpoints/8: {reason(error)}; tried again for 0 s"]


def test_what_the_machine_cannot_read_ends_the_run(folder: Path, said: list[str]):
    read = Reading(folder, EIO, endless=True)
    rule = r"^checkpoints/8 cannot be read, tried for 0 s \(Input/output error\); nothing is changed$"
    with pytest.raises(MachineError, match=rule):
        read_newest(folder, read, alone(), said.append)
    assert read.tries == 4
    assert len(said) == 1


def test_a_folder_that_cannot_be_listed_is_not_taken_for_an_empty_one(
    folder: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
):
    failing, listed = [STALE, STALE], Path.iterdir

    def iterdir(path: Path):
        if failing:
            raise failing.pop()
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    assert read_newest(folder, Reading(folder), alone(), said.append) == Found(8, "state 8", {})
    failing += [STALE] * 9
    with pytest.raises(MachineError, match=r"cannot be looked into, tried for 0 s \(Stale file handle\)$"):
        read_newest(folder, Reading(folder), alone(), said.append)


def test_damaged_content_is_read_twice_then_the_one_before_is_used(folder: Path, said: list[str]):
    read = Reading(folder, LOST)
    assert read_newest(folder, read, alone(), said.append) == Found(8, "state 8", {})
    assert read.tries == 2
    read = Reading(folder, LOST, endless=True)
    assert read_newest(folder, read, alone(), said.append) == Found(4, "state 4", {8: reason(LOST)})
    assert read.tries == 2


def test_numbers_that_are_wrong_are_read_twice_then_the_one_before_is_used(folder: Path, said: list[str]):
    read, wrongs = Reading(folder), ["a bit"]
    wrong = lambda state: wrongs.pop() if wrongs else ""
    assert read_newest(folder, read, alone(), said.append, wrong) == Found(8, "state 8", {})
    assert read.tries == 2
    wrong = lambda state: "a bit" if state == "state 8" else ""
    read = Reading(folder)
    assert read_newest(folder, read, alone(), said.append, wrong) == Found(4, "state 4", {8: "a bit"})
    assert read.tries == 2


def test_where_none_can_be_read_the_newest_is_named(folder: Path):
    def read(step: int) -> str:
        raise KeyError(step)

    with pytest.raises(UserError, match=r"^out: must hold a checkpoint that can be read \(8\), got .*/8$"):
        read_newest(folder, read, alone(), print)


def two(folder: Path, said: list[str], reads: list[Callable[[int], str]], folders: list[Path] | None = None) -> list:
    folders = folders or [folder, folder]
    tell = lambda one: lambda text: said.append(f"{one.process}: {text}")
    return Votes().all(lambda one: read_newest(folders[one.process], reads[one.process], one, tell(one)))


def test_what_one_of_two_processes_reads_the_other_waits_for(folder: Path, said: list[str]):
    reads = [Reading(folder), Reading(folder, EIO, EIO)]
    assert two(folder, said, reads) == [Found(8, "state 8", {})] * 2
    assert [read.tries for read in reads] == [1, 3]  # what is read is kept
    assert sorted(said) == [
        "0: checkpoints/8: process 1 cannot read it; tried again for 0 s",
        "1: checkpoints/8: Input/output error; tried again for 0 s",
    ]


def test_where_the_machine_of_one_fails_all_end_alike(folder: Path, said: list[str]):
    errors = two(folder, said, [Reading(folder), Reading(folder, STALE, endless=True)])
    assert [type(error) for error in errors] == [MachineError] * 2
    assert "(process 1 cannot read it)" in str(errors[0])
    assert "(Stale file handle)" in str(errors[1])


def test_what_is_damaged_for_one_is_damaged_for_all(folder: Path, said: list[str]):
    got = two(folder, said, [Reading(folder), Reading(folder, LOST, endless=True)])
    assert got == [Found(4, "state 4", {8: why}) for why in ("process 1 cannot read it", reason(LOST))]


@pytest.fixture
def behind(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same folder through another host's cache: it shows step 4 only."""
    other = tmp_path_factory.mktemp("behind")
    (other / "4").symlink_to(folder / "4")
    return other


def test_a_checkpoint_that_one_process_sees_late_is_used(folder: Path, behind: Path, said: list[str]):
    late = iter([None, None, lambda: (behind / "8").symlink_to(folder / "8")])

    def tell(text: str) -> None:
        said.append(text)

    def act(one):
        if one.process == 0:
            return read_newest(folder, Reading(folder), one, tell)
        vote = one.lowest

        def lowest(value: int) -> int:  # a cache that catches up after some votes
            if (catch_up := next(late, None)) is not None:
                catch_up()
            return vote(value)

        return read_newest(behind, Reading(behind), type(one)(1, lowest, one.pauses), tell)

    assert Votes().all(act) == [Found(8, "state 8", {})] * 2


def test_a_checkpoint_that_one_process_never_sees_ends_all_and_stays(folder: Path, behind: Path, said: list[str]):
    errors = two(folder, said, [Reading(folder), Reading(behind)], [folder, behind])
    for error in errors:
        assert isinstance(error, UserError)
        assert str(error).startswith(
            "out: must be seen by all processes, on storage that they share (process 1 does not see it after 0 s), got "
        )
    assert steps_in(folder) == {4, 8}


def test_where_one_process_sees_no_checkpoint_nobody_begins_anew(folder: Path, tmp_path: Path, said: list[str]):
    errors = two(folder, said, [Reading(folder)] * 2, [folder, tmp_path / "none"])
    assert [type(error) for error in errors] == [UserError] * 2


def test_a_cache_that_shows_half_a_file_damages_nothing(folder: Path, behind: Path, said: list[str]):
    (behind / "8").mkdir()
    (behind / "8" / "data").write_text("sta")
    reads = [Reading(folder), Reading(behind, LOST, endless=True)]
    for error in two(folder, said, reads, [folder, behind]):
        assert isinstance(error, UserError)
        assert "(not all see the same files in it after 0 s)" in str(error)


def test_a_card_without_room_is_not_tried_again(tmp_path: Path):
    """It fails the same way each time: exit code 1."""
    (tmp_path / "3").mkdir()

    def read(step: int) -> object:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    with pytest.raises(jax.errors.JaxRuntimeError, match="Out of memory"):
        read_newest(tmp_path, read, alone(), pytest.fail)
