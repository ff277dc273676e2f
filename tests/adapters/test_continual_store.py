# SPDX-License-Identifier: Apache-2.0
"""Runs on disk: the state, the rows exactly once, locks, damaged files."""

import json

import pytest
import torch
from pydantic import ValidationError
from stamina_adapters.continual.folder import MARGIN, check_folder, check_room, claim_folder
from stamina_adapters.continual.rows import PairRow, from_line, read_rows, to_line
from stamina_adapters.continual.run import TaskFailedError, run_tasks
from stamina_adapters.continual.store import Lock, RowLog, RunStore, tasks_done
from stamina_adapters.files import write_beside
from stamina_adapters.training.errors import InputError


def _row(number, share=0.5):
    return PairRow(
        method="m",
        seed=0,
        after=number,
        first=1,
        second=2,
        share_first=share,
        share_second=0,
        share_either=share,
    )


class Counting:
    """A workload without a model: its state is the sum of the tasks it has learned."""

    tasks = 4

    def __init__(self):
        self.sum, self.seen = torch.zeros(1), []

    def restore(self, tensors, facts, rows):
        self.sum, self.seen = tensors["sum"].clone(), [row.after for row in rows]
        assert facts == {"last": len(rows) - 1}

    def learn(self, task):
        self.sum += task + 1
        self.seen.append(task + 1)
        self.last = task
        return [_row(task + 1)]

    def snapshot(self):
        return {"sum": self.sum}, {"last": self.last}


def test_a_run_goes_on_where_it_stopped(tmp_path):
    def stop(task, rows):
        if task == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_tasks(Counting(), RunStore(tmp_path), stop)
    again = Counting()
    store = RunStore(tmp_path)
    assert store.done == tasks_done(tmp_path) == 2
    run_tasks(again, store)
    assert again.sum.item() == 10 and again.seen == [1, 2, 3, 4]
    assert [row.after for row in store.rows(PairRow)] == [1, 2, 3, 4]
    whole = RunStore(tmp_path)
    assert whole.done == 4
    run_tasks(Counting(), whole)
    assert (tmp_path / "rows.jsonl").read_text().count("\n") == 4


@pytest.mark.parametrize("cut", [0, 1, 40])
def test_rows_are_brought_to_the_state_whatever_was_written_of_them(tmp_path, cut):
    store = RunStore(tmp_path)
    store.commit({}, {}, [_row(1)])
    store.commit({}, {}, [_row(2), _row(3)])
    file = tmp_path / "rows.jsonl"
    whole = file.read_bytes()
    first = len(to_line(_row(1)))
    file.write_bytes(whole[: first + cut])
    assert RunStore(tmp_path).done == 2
    assert file.read_bytes() == whole
    file.write_bytes(whole + b'{"half of a r')
    RunStore(tmp_path)
    assert file.read_bytes() == whole


def test_a_failed_task_is_noted_until_it_is_tried_again(tmp_path):
    class Failing(Counting):
        def learn(self, task):
            if task == 2:
                raise TaskFailedError("no", [_row(99)])
            return super().learn(task)

    for _ in range(2):
        with pytest.raises(TaskFailedError, match="no"):
            run_tasks(Failing(), RunStore(tmp_path))
        assert [row.after for row in read_rows([tmp_path / "rows.jsonl"], "")] == [1, 2, 99]
    store = RunStore(tmp_path)
    run_tasks(Counting(), store)
    assert [row.after for row in store.rows(PairRow)] == [1, 2, 3, 4]


def test_rows_without_a_state_are_dropped(tmp_path):
    (tmp_path / "rows.jsonl").write_text(to_line(_row(1)))
    assert RunStore(tmp_path).done == 0
    assert (tmp_path / "rows.jsonl").read_text() == ""


def test_a_damaged_state_is_told(tmp_path):
    RunStore(tmp_path).commit({"a": torch.ones(3)}, {}, [])
    file = tmp_path / "state.safetensors"
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(InputError, match="is damaged; remove"):
        RunStore(tmp_path)


def test_missing_and_damaged_rows_are_told(tmp_path):
    RunStore(tmp_path).commit({}, {}, [_row(1)])
    RunStore(tmp_path).commit({}, {}, [_row(2)])
    file = tmp_path / "rows.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:5])
    with pytest.raises(InputError, match=r"rows\.jsonl' is damaged: it holds 5 of"):
        RunStore(tmp_path)
    assert file.read_bytes() == whole[:5]
    file.unlink()
    with pytest.raises(InputError, match=r"rows\.jsonl' is damaged: it holds 0 of"):
        RunStore(tmp_path)
    assert not file.exists()
    file.write_bytes(whole.replace(b"pair", b"paar"))
    with pytest.raises(InputError, match=r"rows\.jsonl' line 1 is no result row"):
        RunStore(tmp_path).rows(PairRow)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "a"
    write_beside(file, b"old")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("stamina_adapters.files.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_beside(file, b"new")
    assert file.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_second_process_is_kept_out(tmp_path):
    with (
        Lock(tmp_path),
        pytest.raises(InputError, match="another process works in"),
        Lock(tmp_path),
    ):
        pass
    with Lock(tmp_path):
        pass


def test_a_log_drops_a_line_cut_in_two(tmp_path):
    file = tmp_path / "log" / "rows.jsonl"
    RowLog(file).append(_row(1))
    with file.open("a") as stream:
        stream.write(to_line(_row(2))[:-5])
    log = RowLog(file)
    assert log.rows == [_row(1)]
    log.append(_row(2))
    assert RowLog(file).rows == [_row(1), _row(2)]
    file.write_text("{}\n")
    with pytest.raises(InputError, match="is damaged; remove it"):
        RowLog(file)


def test_how_far_a_run_is_can_be_asked_without_making_anything(tmp_path):
    assert tasks_done(tmp_path / "none") == 0
    assert not (tmp_path / "none").exists()


def test_rows_are_short_lines_that_read_back():
    line = to_line(_row(1, share=1 / 3))
    assert json.loads(line)["share_first"] == 0.33333
    assert from_line(line) == _row(1, share=0.33333)
    with pytest.raises(ValidationError):
        from_line(line.replace("pair", "paar"))
    with pytest.raises(ValidationError):
        from_line(line.replace('"after"', '"afterwards"'))


def test_a_line_that_is_no_row_is_named(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(to_line(_row(1)) + "nonsense\n")
    with pytest.raises(InputError, match=r"a\.jsonl' line 2 is no result row"):
        list(read_rows([file], "DIR"))


def test_a_folder_belongs_to_one_specification(tmp_path):
    identity = {"spec": {"training": {"steps": 1}, "checkpoints": (1, 2)}}
    folder = tmp_path / "out"
    check_folder(folder, identity)
    claim_folder(folder, identity)
    check_folder(folder, identity)
    other = {"spec": {"training": {"steps": 2}, "checkpoints": (1, 2)}}
    for refuse in (check_folder, claim_folder):
        with pytest.raises(InputError, match=r"another run \(spec\.training\.steps differs\)"):
            refuse(folder, other)
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="in use"):
        check_folder(tmp_path, identity)
    with pytest.raises(InputError, match="is a file"):
        check_folder(tmp_path / "mine.txt", identity)


def test_a_disk_without_room_is_told(tmp_path, monkeypatch):
    check_room(tmp_path / "new" / "deep", 0)

    class Usage:
        free = MARGIN + 10

    monkeypatch.setattr("stamina_adapters.continual.folder.shutil.disk_usage", lambda path: Usage)
    check_room(tmp_path, 10)
    with pytest.raises(InputError, match="MiB free"):
        check_room(tmp_path, 11)
