"""A checkpoint's state on disk, written and read by one process."""

import torch

from megaarch.checkpoint import storage


def test_a_file_is_opened_once_however_many_tensors_are_read_of_it(tmp_path, monkeypatch):
    given = {f"layers.{n}": torch.full((4, 3), float(n)) for n in range(20)}
    storage.save({"model": given, "optimizer": {"lr": 0.5}}, tmp_path)
    index = storage.read_index(tmp_path)
    opened, open_regular = [], storage.open_regular
    monkeypatch.setattr(
        storage, "open_regular", lambda path: opened.append(path.name) or open_regular(path)
    )
    found = {name: torch.zeros(4, 3) for name in given}
    values = storage.read({"model": found, "optimizer": {"lr": 1.0}}, tmp_path, index)
    assert values["optimizer"] == {"lr": 0.5}
    assert all(torch.equal(found[name], given[name]) for name in given)
    assert opened == ["__0_0.distcp"]
