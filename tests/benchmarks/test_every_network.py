"""The table of networks that full ranks reproduce: a good one, and one that fails by name."""

import json

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
