"""Files that rot: emptied, cut, one bit flipped, gone. A damaged file of a finished cell is named and never read as a result; an
interrupted cell goes on from what is whole and ends with the numbers of a run left in peace. Each file is damaged at its head, middle and
tail, because no single place shows that all of it is checked.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from faults import LIGHT, is_one_line, numbers, pretend
from frames import small_frame

from dpgbench.core.errors import UserError
from dpgbench.core.files import write_atomically
from dpgbench.store import checkpoints, parquet
from dpgbench.store.checkpoints import Checkpoints
from dpgbench.store.run_folder import CHECKED, GROWING


def cut(content: bytes, at: float) -> bytes:
    return content[: int(at * len(content))]


def flipped(content: bytes, at: float) -> bytes:
    place = min(int(at * len(content)), len(content) - 1)
    return content[:place] + bytes([content[place] ^ 0x04]) + content[place + 1 :]


DAMAGES = {
    "empty": lambda content: b"",
    "cut at the head": lambda content: cut(content, 0.1),
    "cut in the middle": lambda content: cut(content, 0.5),
    "cut at the tail": lambda content: content[:-1],
    "a bit at the head": lambda content: flipped(content, 0.02),
    "a bit in the middle": lambda content: flipped(content, 0.5),
    "a bit at the tail": lambda content: flipped(content, 0.97),
    "gone": None,
}


def damaged(path: Path, damage) -> None:
    if damage is None:
        path.unlink()
    else:
        changed = damage(path.read_bytes())
        assert path.read_bytes() != changed
        path.write_bytes(changed)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("name", ["result.json", "metrics.jsonl"])
def test_a_damaged_result_is_none(tmp_path, quiet, name, damage):
    """Nor is it run again unasked: only a result that is gone altogether is as good as none."""
    folder = pretend(tmp_path)
    damaged(folder.path / name, damage)
    state = folder.state()
    if (name, damage) == ("result.json", None):
        assert numbers(pretend(tmp_path)) == quiet
        return
    assert state.name == "damaged" and name in state.detail
    with pytest.raises(UserError, match="delete the folder and run the cell again"):
        folder.result()
    assert numbers(pretend(tmp_path)) == quiet


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("name", CHECKED)
def test_a_damaged_file_of_a_finished_cell_is_named(tmp_path, name, damage):
    folder = pretend(tmp_path)
    assert folder.whole(name).read_bytes()
    damaged(folder.path / name, damage)
    with pytest.raises(UserError, match=f"{name} is (gone|not what the finished run wrote).*; delete the folder and run the cell again"):
        folder.text(name)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("name", [*GROWING, "the newest checkpoint", "both checkpoints", "spec.yaml", "env.json"])
def test_a_damaged_file_of_an_interrupted_cell_changes_no_number(tmp_path, quiet, name, damage):
    folder = pretend(tmp_path, until=4)
    steps = checkpoints.steps_in(folder.path)
    assert steps == [3, 2]
    counts = {"the newest checkpoint": 1, "both checkpoints": 2}
    paths = [checkpoints.path_of(folder.path, step) for step in steps[: counts.get(name, 0)]] or [folder.path / name]
    for path in paths:
        damaged(path, damage)
    assert folder.state().name in ("interrupted", "missing")
    assert numbers(pretend(tmp_path)) == quiet


def test_no_bit_of_a_checkpoint_can_flip_unseen(tmp_path):
    """Some hundred of them, over the header, the numbers in it, and the tensors."""
    saving = Checkpoints(tmp_path, {"hash": "a", "code": "b"})
    saving.save(1, {"place": torch.arange(40.0)}, {"numbers": {"spent": 123456}, "growing": {}})
    path = checkpoints.path_of(tmp_path, 1)
    whole = path.read_bytes()
    assert saving.newest(lambda growing: True) is not None
    for place in range(0, len(whole), 2):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place // 2 % 8)]) + whole[place + 1 :])
        found = saving.newest(lambda growing: True)
        if found is not None:  # a bit of safetensors' own, say a name of a type in another case, that changes nothing
            assert found[1]["numbers"] == {"spent": 123456} and torch.equal(found[0].tensors["place"], torch.arange(40.0)), place


@pytest.mark.parametrize("damage", [damage for damage in DAMAGES.values() if damage], ids=[name for name in DAMAGES if DAMAGES[name]])
@pytest.mark.parametrize("columns", [3, 30])
def test_a_damaged_parquet_is_refused(tmp_path, request, damage, columns):
    """Or read as it was: a footer has counts and bounds of the columns that nothing here uses."""
    import pandas

    path = tmp_path / "a.parquet"
    frame = pandas.concat([small_frame()] * 10, ignore_index=True)
    frame = frame.assign(**{f"metric:{number}": [1 / (row + 3) for row in range(len(frame))] for number in range(columns)})
    parquet.write_parquet(frame, path, suite="a", title="b", command="c")
    whole = parquet.read_parquet(path)[0]
    assert whole["metric:0"].equals(frame["metric:0"])
    damaged(path, damage)
    try:
        pandas.testing.assert_frame_equal(parquet.read_parquet(path)[0], whole)
        assert "bit" in request.node.callspec.id
    except UserError as refused:
        assert "cannot be read as parquet" in str(refused) and "; restore it or run the suite again" in str(refused)


def test_no_bit_of_a_parquets_footer_can_flip_unseen(tmp_path):
    """It holds the names of the columns and what the file says of itself, and has no checksum of parquet's."""
    import pandas

    path = tmp_path / "a.parquet"
    parquet.write_parquet(small_frame(), path, suite="a", title="b", command="c")
    (frame, about), whole = parquet.read_parquet(path), path.read_bytes()
    for place in range(0, len(whole), 101):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place // 101 % 8)]) + whole[place + 1 :])
        try:
            found, said = parquet.read_parquet(path)
        except UserError:
            continue
        pandas.testing.assert_frame_equal(found, frame)
        assert said == about


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_memory_of_a_sweep_is_one_line(dpgbench, tmp_path, damage):
    """What `status name=...` reads; a word that lost a bit is refused as any other word that was typed wrong."""
    saved = tmp_path / "runs" / "mine.sweep.json"
    write_atomically(saved, json.dumps([*LIGHT[:2], "name=mine"]))
    assert dpgbench("status", "name=mine", f"results={tmp_path}").code == 0
    damaged(saved, damage)
    done = dpgbench("status", "name=mine", f"results={tmp_path}")
    if damage is not None:
        is_one_line(done, 2)
