"""The table of networks that full ranks reproduce: a good one, and one that fails by name."""

import json

import pytest

from benchmarks import every_network


def test_a_network_is_a_row_and_a_failure_is_one_too(tmp_path, capsys):
    given = ["--models", "squeezenet1_1", "mobilenet_v2", "--size", "32", "--out", str(tmp_path)]
    assert every_network.main(given) == 0
    first, second = json.loads((tmp_path / "every-network.json").read_text())["rows"]
    assert first["difference"] < 1e-4
    assert second["because"]["a depthwise convolution"] > 10
    assert "squeezenet1_1" in (tmp_path / "every-network.md").read_text()
    assert every_network.main([*given[:2], "--size", "8", "--out", str(tmp_path)]) == 1
    assert "error" in capsys.readouterr().out


def test_a_stopped_run_goes_on_and_other_settings_begin_again(tmp_path, monkeypatch):
    tried = []

    def checked(name, size):
        tried.append((name, size))
        if len(tried) == 2:
            raise KeyboardInterrupt
        return {"network": name, "factorised": 1, "dense": 0, "because": {}, "difference": 0.0, "seconds": 0.0}

    monkeypatch.setattr(every_network, "checked", checked)
    monkeypatch.setattr(every_network, "provenance", lambda *_: {"git_revision": "abc", "versions": {}})
    given = ["--models", "resnet18", "timm:resnet18", "--size", "32", "--out", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        every_network.main(given)
    assert every_network.main(given) == 0
    assert tried == [("resnet18", 32), ("timm:resnet18", 32), ("timm:resnet18", 32)]
    assert (
        "1 of torchvision's, 1 of timm's; 0 not. Rows by revision: 2 at abc."
        in (tmp_path / "every-network.md").read_text()
    )
    every_network.main(["48" if word == "32" else word for word in given])
    assert tried[3:] == [("resnet18", 48), ("timm:resnet18", 48)]
    monkeypatch.setattr(every_network, "provenance", lambda *_: {"git_revision": "def", "versions": {}})
    every_network.main([*given, "--keep"])  # the file is of size 48 by now: nothing to keep
    assert tried[5:] == [("resnet18", 32), ("timm:resnet18", 32)]
    monkeypatch.setattr(every_network, "provenance", lambda *_: {"git_revision": "ghi", "versions": {}})
    every_network.main([*given, "--keep"])
    assert len(tried) == 7
    assert "Rows by revision: 2 at def." in (tmp_path / "every-network.md").read_text()


def test_a_damaged_table_is_an_error_that_names_it(tmp_path, capsys):
    (tmp_path / "every-network.json").write_text("{}")
    assert every_network.main(["--models", "resnet18", "--out", str(tmp_path)]) == 2
    assert "every-network.json" in capsys.readouterr().err
