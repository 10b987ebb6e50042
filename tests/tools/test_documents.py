"""What README and docs state is made from files under results/, and nothing measured is written by hand."""

import copy
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tools import benchmark_parts, command_parts, documents, run_parts, update_docs

ROOT = Path(__file__).resolve().parents[2]


def run(*, seed=0, accuracy=0.990, params=40_000, seconds=0.002):
    """A run as `jsonify_logs.py` writes it, of one screened and one fine-tuned candidate."""
    tested = {"trial": "0.1-3", "params": params, "flops": 5_000_000, "accuracy": accuracy, "status": "fine-tuned"}
    tested |= {"inference_time": seconds, "compression_rate": 1_000_000 / params, "config_str": "a:(1)"}
    versions = {"torch": "2.0", "onnxruntime": "1.0"}
    header = {"model": "resnet18", "dataset": "mnist", "image_size": 32, "seed": seed, "train_limit": None}
    header |= {"machine": "m", "device": "cpu", "threads": 2, "versions": versions, "git_revision": "abc"}
    header |= {"runtime": "onnxruntime", "latency_batch": 16}
    header |= {"search_seconds": {"screen": 60.0, "finetune": 120.0, "total": 200.0, "exhaustive": 4000.0}}
    baseline = {"architecture": "resnet18", "params": 1_000_000, "flops": 50_000_000, "accuracy": 0.993}
    counts = {"tried": 2, "succeeded": 2, "failed": 0, "fine_tuned": 1, "screened": 1, "damaged": 0}
    return {
        "header": header,
        "baseline": {**baseline, "inference_time": 0.01},
        "counts": counts,
        "candidates": [tested],
    }


PUBLISHED = {
    "source": "Somewhere.",
    "dataset": "mnist",
    "models": {
        "Resnet": {
            "params_reduction": 0.87,
            "flops_reduction": 0.95,
            "speedup": 0.36,
            "gpu_seconds_per_candidate": 214,
        }
    },
}


@pytest.fixture
def repository(tmp_path):
    """A copy of the documents and of what they are made from."""
    for name in (*update_docs.DOCUMENTS, "results"):
        source, target = ROOT / name, tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            ignored = shutil.ignore_patterns("*.png", "*.safetensors", "demo")
            shutil.copytree(source, target, ignore=ignored, dirs_exist_ok=True)
        else:
            shutil.copy(source, target)
    return tmp_path


def test_a_changed_document_is_noticed_and_mended(repository, capsys):
    readme = repository / "README.md"
    honest = readme.read_text()
    readme.write_text(honest.replace("| Resnet ", "| Resnext ", 1))
    assert update_docs.main(["--check", "--root", str(repository)]) == 1
    assert "README.md is not up to date" in capsys.readouterr().err
    assert update_docs.main(["--root", str(repository)]) == 0
    assert readme.read_text() == honest
    readme.write_text(honest + "\nIt is 12.5x faster.\n")
    assert update_docs.main(["--check", "--root", str(repository)]) == 1
    assert "It is 12.5x faster." in capsys.readouterr().err


def test_a_figure_in_a_notebooks_prose_is_noticed(repository, capsys):
    cell = {"cell_type": "markdown", "source": ["It saves 12.5 % here."]}
    (repository / "htd-a-res.ipynb").write_text(json.dumps({"cells": [cell]}))
    assert update_docs.main(["--check", "--root", str(repository)]) == 1
    assert "htd-a-res.ipynb states a measured figure outside its markers: It saves 12.5 %" in capsys.readouterr().err


def test_figures_in_code_and_between_markers_are_no_loose_ends():
    assert documents.untraced("`--tolerance 5 %`\n```\n12 minutes\n```\n<!-- a:begin -->\n99 %\n<!-- a:end -->\n") == []
    assert documents.untraced("saves 97.4 % of it\nat 32 px") == ["saves 97.4 % of it"]


def test_only_known_parts_are_filled():
    text = "<!-- a:begin -->\nold\n<!-- a:end -->\n"
    assert documents.fill(text, {"a": lambda: "new"}) == "<!-- a:begin -->\nnew\n<!-- a:end -->\n"
    with pytest.raises(ValueError, match="no part is called 'a'"):
        documents.fill(text, {"b": lambda: "new"})


def test_the_comparison_says_where_it_is_not_ahead():
    text = run_parts.against_published([run()], PUBLISHED)
    lines = {line.split("|")[2].strip(): line for line in text.splitlines() if line.startswith("| Resnet")}
    verdicts = {label: line.split("|")[4].strip() + " " + line.split("|")[5].strip() for label, line in lines.items()}
    assert verdicts == {"parameters": "-96.0% yes", "FLOPs": "-90.0% no", "speed": "5.00x yes"}
    assert "none within tolerance" in run_parts.against_published([run(accuracy=0.9)], PUBLISHED)


def at(size, dataset="mnist", **options):
    """`run()` at another image size or on another data set."""
    made = run(**options)
    return {**made, "header": {**made["header"], "image_size": size, "dataset": dataset}}


def test_the_largest_size_of_each_task_speaks_for_it():
    runs = [at(32), at(224), at(224, seed=1), at(64, "fashion-mnist")]
    assert run_parts.largest(runs) == runs[1:]


def test_only_the_published_data_set_is_compared_and_at_its_largest_size():
    runs = [at(32, params=10_000), at(224), at(64, "fashion-mnist", params=10_000)]
    assert run_parts.against_published(runs, PUBLISHED) == run_parts.against_published([at(224)], PUBLISHED)


def test_a_notebook_that_was_not_run_to_its_end_is_refused():
    executed = {"input_path": "/a/htd-vgg-res.ipynb", "duration": None, "parameters": {}}
    with pytest.raises(ValueError, match=r"htd-vgg-res\.ipynb under mnist-224 was not run to its end"):
        command_parts._notebook_command("mnist-224", executed)


def test_seeds_are_listed_with_their_spread_and_a_lone_run_is_not():
    text = run_parts.seeds([run(), run(seed=1, params=60_000)])
    assert "95.00% ± 1.41%" in text
    assert "Resnet" not in run_parts.seeds([run()])


def test_a_search_is_priced_beside_the_exhaustive_one():
    text = run_parts.search_costs([run()], PUBLISHED)
    assert [cell.strip() for cell in text.splitlines()[-1].split("|")[2:-1]] == [
        "2",
        "1.0",
        "2.0",
        "3.3",
        "66.7",
        "20x",
        "100.0",
        "214",
    ]
    without = copy.deepcopy(run())
    del without["header"]["search_seconds"]
    assert "20x" not in run_parts.search_costs([without], PUBLISHED)


def test_methods_on_a_published_network_stand_beside_each_other():
    def one(method, budget, epochs, accuracy, seed=0):
        return {
            "network": "N",
            "method": method,
            "budget": budget,
            "epochs": epochs,
            "test_accuracy": accuracy,
            "seed": seed,
        }

    rows = [one("ours", 0.5, 0, 0.88), one("ours", 0.5, 0, 0.86, seed=1), one("ours", 0.5, 3, 0.895)]
    rows += [one("pruning", 0.5, 0, 0.1), one("pruning", 0.5, 3, 0.85), one("ours", 0.3, 3, 0.7)]
    rows += [one("dense, trained on", 1.0, 3, 0.91), {**one("lame", 0.5, 3, 0), "failed": "why"}]
    del rows[-1]["test_accuracy"]
    text = benchmark_parts.beside_others({"rows": rows, "dense": {"N": 0.9, "other": 0.8}}, "N")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert lines[0] == ["points lost", "50%, untrained", "50%, 3 epochs", "30%, 3 epochs"]
    assert lines[2:] == [["ours", "3.00 ± 1.41", "1.50", "21.00"], ["pruning", "-", "6.00", "-"]]
    assert "Dense: 0.9000, trained on as long 0.9100. Lower is better. ±: of 2 seeds, else of one." in text
    tuned = [one("ours", 0.5, 0, 0.89)]
    text = benchmark_parts.beside_others({"rows": rows, "dense": {"N": 0.9}}, "N", tuned)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert lines[0] == ["points lost", "50%, untrained", "50%, tuned", "50%, 3 epochs", "30%, 3 epochs"]
    assert lines[2:] == [["ours", "3.00 ± 1.41", "1.00", "1.50", "21.00"], ["pruning", "-", "-", "6.00", "-"]]


COMMAND = re.compile(r"`((?:python|papermill|make|\.venv/bin/\w+) [^`\n]+)`|^((?:python|make) .*)$", re.MULTILINE)


@pytest.mark.parametrize("name", update_docs.DOCUMENTS)
def test_every_printed_command_is_one_that_a_shell_can_read(name):
    found = [one or other for one, other in COMMAND.findall((ROOT / name).read_text())]
    assert found or name == "docs/method.md"
    for command in found:
        done = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr}"


@pytest.mark.parametrize("name", update_docs.DOCUMENTS)
def test_documents_name_files_that_exist(name):
    text = documents.MARKER.sub("", (ROOT / name).read_text())
    paths = re.findall(r"\]\((?!http)([^)#]+)\)|`((?:common|tests|tools|benchmarks|docs|finetuned)/[\w./-]+)`", text)
    for link, code in paths:
        path = (ROOT / name).parent / link if link else ROOT / code
        assert path.exists() or "saved_models" in code, link or code


def test_one_row_a_network_counts_seeds_and_names_the_machine():
    table = run_parts.networks([run(), run(seed=1, params=20_000)], "mnist")
    assert "| ResNet18" in table
    assert "1 M → 30 k (33x)" in table
    assert "50 M → 5 M (10x)" in table
    assert "0.9930 → 0.9900" in table
    assert "5.0x" in table
    assert table.splitlines()[2].rstrip("| ").endswith("2")
    last = table.splitlines()[-1]
    assert last == "m, 2 threads; speed in onnxruntime 1.0, batch 16, dense and compressed interleaved."
    other = run(seed=1)
    other["header"] |= {"machine": "A(R) B(R) Processor", "model": "alexnet"}
    other["baseline"]["architecture"] = "alexnet"
    last = run_parts.networks([run(), other], "mnist").splitlines()[-1]
    assert last.startswith("ResNet18: m, 2 threads; AlexNet: A B, 2 threads; speed in ")
    assert last.count("speed in onnxruntime 1.0, batch 16") == 1
    other["header"]["machine"] += " (AVX2)"
    assert "AlexNet: A B (AVX2), 2 threads" in run_parts.networks([run(), other], "mnist")
    assert "none within tolerance" in run_parts.networks([run(accuracy=0.5)], "mnist")
    assert "ResNet18" not in run_parts.networks([run()], "fashion-mnist")


def test_only_fine_tuned_accuracies_stand_in_the_short_table_of_rules():
    row = {"table": "rules", "name": "policy", "budget": 0.15, "val_screened": 0.1}
    rows = [{**row, "seed": seed, "test_accuracy": 0.8 + seed / 100} for seed in (0, 1)]
    rows += [{**row, "seed": 0, "name": "vbmf", "status": "failed"}]
    table = benchmark_parts.fine_tuned({"rows": rows, "dense_test": 0.91})
    assert "0.8050 ± 0.0071" in table
    assert "vbmf" not in table
    assert table.endswith("Dense: 0.9100. Mean ± standard deviation of 2 seeds.")
