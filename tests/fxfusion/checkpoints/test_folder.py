"""Folders are replaced as a whole: whatever goes wrong, the old one can be loaded, and nothing is left behind."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fxfusion import files
from fxfusion.checkpoints import folder
from fxfusion.checkpoints.folder import check_replaceable, existing, replacing
from fxfusion.checkpoints.reading import CheckpointReader
from fxfusion.checkpoints.shards import TensorFacts, write_shards
from fxfusion.errors import CheckpointError
from fxfusion.files import RECORD
from tests.fxfusion.checkpoints.faults import OPERATIONS, Faults, Killed, count_operations

ROOT = Path(__file__).resolve().parents[3]
SHARDS = 12


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that dies in a test takes no power with it; a thousand waits for the disk would take minutes."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def tensors(value: float) -> dict[str, Tensor]:
    return {f"t{number:02}": torch.full((8,), value) for number in range(SHARDS)}


def write(directory: Path, value: float) -> None:
    """A checkpoint of many small shards."""
    content = tensors(value)
    with replacing(directory) as fresh:
        folder.write_file(fresh / "config.json", f'{{"value": {value}}}')
        write_shards(fresh, [TensorFacts.of(*item) for item in content.items()], content.items(), max_shard_size=32)


def value_of(directory: Path) -> float:
    """What all tensors and the config of a checkpoint agree on."""
    reader = CheckpointReader.open(directory)
    assert sorted(reader.stored) == sorted(tensors(0))
    values = {reader.read(name).unique().item() for name in reader.stored}
    assert values == {reader.folder.json("config.json")["value"]}
    return values.pop()


def beside(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.parent.iterdir() if path != directory)


def test_a_new_folder_an_empty_one_and_an_old_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for directory in (tmp_path / "deep" / "new", tmp_path / "empty"):
        for value in (1.0, 2.0):
            write(directory, value)
            assert value_of(directory) == value
            assert not [name for name in beside(directory) if name.startswith(".")]


def test_an_error_inside_leaves_the_old_folder(tmp_path: Path) -> None:
    write(tmp_path / "model", 1.0)
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "model") as fresh:
        (fresh / "config.json").write_text("{}")
        _ = 1 / 0
    assert value_of(tmp_path / "model") == 1.0
    assert beside(tmp_path / "model") == []


@pytest.mark.filterwarnings("ignore:.*could not be removed")
@pytest.mark.parametrize("exchanges", [True, False], ids=["exchange", "two renames"])
@pytest.mark.parametrize("kind", ["full", "kill"])
def test_a_failure_at_any_operation_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, exchanges: bool
) -> None:
    """Each of the operations of a write fails in turn; the next write cleans up."""
    directory = tmp_path / "model"
    if not exchanges:
        monkeypatch.setattr(folder, "_renameat2", lambda: None)
    write(directory, 1.0)
    points = count_operations(lambda: write(directory, 1.0))
    assert points >= 50
    kept, replaced = 0, 0
    for at in range(points):
        with pytest.MonkeyPatch.context() as faulty:
            Faults(faulty, at, kind)
            try:
                write(directory, 2.0)
            except (CheckpointError, Killed) as error:
                assert isinstance(error, Killed) == (kind == "kill")
                assert kind == "kill" or "No space left" in str(error)
        value = value_of(directory)
        kept, replaced = kept + (value == 1.0), replaced + (value == 2.0)
        write(directory, 1.0)
        assert beside(directory) == []
    # Only the last operations come after the point of no return: waiting for the folder's name, removing the old one.
    assert kept >= points - 3 and replaced <= 3


def test_without_the_exchange_a_failure_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail: a folder that is written in place is broken by the same faults."""

    def in_place(directory: Path) -> None:
        content = tensors(2.0)
        for path in directory.iterdir():
            folder.remove(path)
        folder.write_file(directory / "config.json", '{"value": 2.0}')
        write_shards(directory, [TensorFacts.of(*item) for item in content.items()], content.items(), max_shard_size=32)

    directory = tmp_path / "model"
    write(directory, 1.0)
    Faults(monkeypatch, 20, "kill")
    with pytest.raises(Killed):
        in_place(directory)
    with pytest.raises(CheckpointError):
        value_of(directory)


def test_every_operation_of_the_disk_is_counted() -> None:
    public = {name for name, value in vars(folder).items() if callable(value) and value.__module__ == folder.__name__}
    assert {name for name in public if not name.startswith("_")} == {
        *(*OPERATIONS, "write_file", "write_tensors", "replacing", "check_replaceable", "existing")
    }


def test_a_folder_between_two_renames_is_found_by_readers_and_writers(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    for next_step in (value_of, lambda path: write(path, 1.0)):
        write(directory, 1.0)
        (tmp_path / ".model.89abcdef.partial").mkdir()
        put_aside(directory)
        next_step(directory)
        assert value_of(directory) == 1.0
    assert beside(directory) == []


@pytest.mark.parametrize("name", [".model.0123abcd.old", ".model.0123abcd.partial"])
def test_what_only_looks_like_a_left_over_is_kept(tmp_path: Path, name: str) -> None:
    """A suffix tells nothing: a backup may have that name, even one of a folder that was written here."""
    write(tmp_path / "model", 1.0)
    shutil.copytree(tmp_path / "model", tmp_path / name)
    write(tmp_path / "model", 2.0)
    assert value_of(tmp_path / name) == 1.0
    shutil.rmtree(tmp_path / "model")
    write(tmp_path / "model", 3.0)
    assert value_of(tmp_path / name) == 1.0 and value_of(tmp_path / "model") == 3.0


def put_aside(directory: Path) -> Path:
    """As a process leaves it that dies between two renames, just before the second."""
    renames = []

    def rename(source: Path, target: Path) -> None:
        renames.append(target)
        if len(renames) > 1:
            raise Killed("rename")
        os.rename(source, target)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(folder, "_renameat2", lambda: None)
        patch.setattr(folder, "rename", rename)
        patch.setattr(folder, "_discard", lambda path: None)
        write(directory, 9.0)
    assert not directory.exists()
    return renames[0]


def test_a_reader_without_rights_reads_the_old_folder_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*paths: Path) -> None:
        raise PermissionError(13, "Permission denied")

    write(tmp_path / "model", 1.0)
    old = put_aside(tmp_path / "model")
    monkeypatch.setattr(folder, "rename", refuse)
    assert existing(tmp_path / "model") == old


def test_the_folder_of_a_living_writer_is_left_alone(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    with replacing(directory) as first:
        write(directory, 1.0)
        assert first.is_dir()
        (first / "config.json").write_text("{}")
    assert (directory / "config.json").read_text() == "{}"
    assert beside(directory) == []


def test_a_link_to_a_folder_stays_one(tmp_path: Path) -> None:
    write(tmp_path / "real", 1.0)
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link", 2.0)
    assert (tmp_path / "link").is_symlink()
    assert value_of(tmp_path / "real") == 2.0


@pytest.mark.parametrize("name", ["notes.txt", "train.py", "checkpoint-500", "optimizer.pt", ".git"])
def test_a_folder_with_other_things_is_refused(tmp_path: Path, name: str) -> None:
    write(tmp_path / "model", 1.0)
    path = tmp_path / "model" / name
    path.mkdir() if "." not in name[1:] else path.write_text("mine")
    with pytest.raises(CheckpointError, match=f"it holds {name}"):
        write(tmp_path / "model", 2.0)
    path.rename(tmp_path / "elsewhere")
    assert value_of(tmp_path / "model") == 1.0


@pytest.mark.parametrize("how", ["edited", "same size", "link", "foreign", "record gone", "renamed"])
def test_a_folder_that_is_not_as_it_was_written_needs_to_be_told(tmp_path: Path, how: str) -> None:
    directory = tmp_path / "model"
    write(directory, 1.0)
    config = directory / "config.json"
    if how == "edited":
        config.write_text('{"value": 1.00}')
    elif how == "same size":
        config.write_text('{"value": 7.0}')
    elif how == "link":
        config.rename(tmp_path / "config.json")
        config.symlink_to(tmp_path / "config.json")
    elif how == "foreign":  # all names are those of a checkpoint
        (directory / "tokenizer.json").write_text("{}")
    elif how == "record gone":
        (directory / RECORD).unlink()
    else:
        config.rename(directory / "generation_config.json")
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    with pytest.raises(CheckpointError, match=r"config.json|tokenizer.json"):
        write(directory, 2.0)
    with pytest.raises(CheckpointError, match="--overwrite"):
        check_replaceable(directory)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    with replacing(directory, overwrite=True) as fresh:
        folder.write_file(fresh / "only.txt", "x")
    assert sorted(path.name for path in directory.iterdir()) == [RECORD, "only.txt"]
    write(directory, 3.0)
    assert value_of(directory) == 3.0


def test_what_is_read_is_not_written_over(tmp_path: Path) -> None:
    write(tmp_path / "models" / "model", 1.0)
    (tmp_path / "link").symlink_to(tmp_path / "models" / "model")
    for out in ("models", "models/model", "link"):
        with pytest.raises(CheckpointError, match="which the same command reads: it would be lost"):
            check_replaceable(tmp_path / out, overwrite=True, reads=[tmp_path / "models" / "model"])
    check_replaceable(tmp_path / "models" / "other", reads=[tmp_path / "models" / "model"])


def test_not_even_who_asks_for_it_loses_his_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home" / "me").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home" / "me"))
    for name in ("home", "home/me"):
        (tmp_path / "home" / "me" / "x").write_text("x")
        with pytest.raises(CheckpointError, match="is or holds"):
            check_replaceable(tmp_path / name, overwrite=True)


def test_large_files_are_known_by_size_time_and_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_WHOLE", 2)
    write(tmp_path / "model", 1.0)
    write(tmp_path / "model", 2.0)
    os.utime(tmp_path / "model" / "config.json", ns=(1, 1))
    with pytest.raises(CheckpointError, match="config.json was changed since"):
        write(tmp_path / "model", 3.0)


WITHOUT_FCNTL = """
import sys
from pathlib import Path
sys.modules["fcntl"] = None
import fxfusion, fxfusion.checkpoints.api, fxfusion.cli
from tests.fxfusion.checkpoints.test_folder import value_of, write
for value in (1.0, 2.0):
    write(Path(sys.argv[1]), value)
assert value_of(Path(sys.argv[1])) == 2.0
"""


def test_a_system_without_locks_reads_and_writes(tmp_path: Path) -> None:
    """Windows has no `fcntl`."""
    command = [sys.executable, "-c", WITHOUT_FCNTL, str(tmp_path / "model")]
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert beside(tmp_path / "model") == []


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "README.md").write_text("x")
    for name, why in (("file", "is a file"), ("docs", "it holds README.md, which is by others")):
        with pytest.raises(CheckpointError, match=why):
            write(tmp_path / name, 1.0)
    with pytest.raises(CheckpointError, match="no name"):
        write(Path("/"), 1.0)
    with pytest.raises(CheckpointError, match="is a file"):
        existing(tmp_path / "file")
    with pytest.raises(CheckpointError, match="does not exist"):
        existing(tmp_path / "nothing")


def test_what_cannot_be_removed_is_told_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remove = folder.remove

    def refuse(path: Path) -> None:
        if path.is_dir():
            raise OSError(16, "Device or resource busy")
        remove(path)

    write(tmp_path / "model", 1.0)
    with monkeypatch.context() as busy, pytest.warns(UserWarning, match="busy"):
        busy.setattr(folder, "remove", refuse)
        write(tmp_path / "model", 2.0)
    assert len(beside(tmp_path / "model")) == 1
    write(tmp_path / "model", 3.0)
    assert value_of(tmp_path / "model") == 3.0
    assert beside(tmp_path / "model") == []


def test_a_disk_that_does_not_confirm_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> None:
        if path == tmp_path:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(folder, "sync", fail)
    with pytest.raises(CheckpointError, match="is written, but the disk does not confirm it"):
        write(tmp_path / "model", 1.0)
    assert value_of(tmp_path / "model") == 1.0


WRITER = """
import sys
from pathlib import Path
from tests.fxfusion.checkpoints.test_folder import write
print("ready", flush=True)
for value in range(10**6):
    write(Path(sys.argv[1]), float(value % 2))
"""


@pytest.mark.slow
def test_a_killed_process_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    write(directory, 1.0)
    wait = random.Random(0)
    left_over = 0
    for _ in range(6):
        command = [sys.executable, "-c", WRITER, str(directory)]
        child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        time.sleep(wait.uniform(0.05, 0.4))
        os.kill(child.pid, signal.SIGKILL)
        child.communicate()
        assert value_of(directory) in (0.0, 1.0)
        left_over += len(beside(directory))
    assert left_over, "no process was killed while it wrote"
    write(directory, 1.0)
    assert beside(directory) == []


def test_the_lock_goes_with_its_owner(tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    with folder._locked(tmp_path / "f"):
        assert folder._is_locked(tmp_path / "f")
    assert not folder._is_locked(tmp_path / "f")
