"""The command line: what it prints, what it leaves, and how it fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import toys
import yaml

import slivo
from slivo import cli
from slivo.train import read

TESTS = Path(__file__).parent
SHORT = toys.recipe({"prune": {"criterion": "l2"}}, {"distill": {**toys.KD, "epochs": 1}})
LONG = toys.recipe({"finetune": {"epochs": 2000, "batch_size": 8}}, target={})

Call = Callable[..., tuple[int, str, str]]


def written(recipe: dict[str, Any], name: str = "recipe.yaml") -> Path:
    Path(name).write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return Path(name)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact") / "net"
    inputs = [{"shape": [2, 12], "dtype": "float32"}]
    return slivo.save(toys.net(8), folder, factory="toys:net", args={"width": 8}, meta={"inputs": inputs})


def test_a_run_prints_both_networks_and_where_everything_is(call: Call) -> None:
    code, out, err = call("run", written(SHORT))
    assert (code, err) == (0, "")
    for text in ("[1/3] teacher:", "[2/3] prune:", "[3/3] distill:", "Accuracy", "Recall", "MACs", "Bytes on disk"):
        assert text in out
    for text in ("Latency p50, batch 1 ", "Latency p95, batch 64", "target (macs 0.5): met", "runs/toy", "report.html"):
        assert text in out
    assert "\x1b" not in out  # no colors where there is no terminal
    names = {file.name for file in Path("runs/toy").iterdir()}
    assert names == {"run.json", "metrics.jsonl", "summary.json", "report.html", "teacher", "student"}


def test_a_quiet_run_shows_the_result_alone(call: Call) -> None:
    code, out, _ = call(
        "run", written(SHORT), "--quiet", "--out", "x", "--set", "stages.1.distill.epochs=2", "--seed", 3
    )
    assert code == 0
    assert "prune" not in out
    assert "Accuracy" in out
    book = json.loads(Path("x/run.json").read_text())
    assert (book["seed"], book["recipe"]["stages"][1]["distill"]["epochs"]) == (3, 2)


def test_several_seeds_end_in_their_median(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    from slivo.recipe import load

    monkeypatch.setattr("slivo.recipe.load", lambda _: load({**SHORT, "target": {"macs": 0.5, "max_drop": 1.0}}))
    code, out, _ = call("demo", "--seeds", 2, "--quiet", "--seed", 5)
    assert code == 0
    assert "median" in out
    assert {folder.name for folder in Path("runs/demo").iterdir()} == {"seed-5", "seed-6"}
    monkeypatch.setattr("slivo.recipe.load", lambda _: load({**SHORT, "target": {"macs": 0.5, "bytes": 0.01}}))
    code, out, err = call("demo", "--seeds", 2)
    assert (code, err) == (1, "error: the median misses the target\n")
    assert Path("runs/demo-2/seed-1/summary.json").exists()  # what there was is left alone
    assert "seed 0" in out


def test_one_demo_is_one_run(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    from slivo.recipe import load

    monkeypatch.setattr("slivo.recipe.load", lambda _: load(SHORT))
    assert call("demo", "--out", "d")[0] == 0
    assert Path("d/summary.json").exists()


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ({"stagess": []}, 2, "recipe.yaml:12: stagess is no key here"),
        ({"target": {"macs": "half"}}, 2, "target.macs is 'half'; a share between 0 and 1"),
        ({"target": {"macs": 50}}, 2, "target.macs is 50; a share between 0 and 1 (0.5 keeps half). Did you mean 0.5?"),
        ({"teacher": {"model": "nowhere:net"}}, 2, "module 'nowhere' cannot be imported"),
        ({"task": {"kind": "image-classification", "data": "toys:other_task"}}, 1, "got an input of shape (2, 5)"),
        ({"target": {"macs": 0.001}}, 1, "the budget cannot be met: MACs"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused_in_two_lines(
    call: Call, change: dict[str, Any], code: int, message: str
) -> None:
    found, out, err = call("run", written({**SHORT, **change}))
    assert found == code
    assert message in err or message.partition(":12:")[2] in err
    assert len(err.splitlines()) <= 2
    assert "Traceback" not in out + err
    assert not Path("runs").exists()


def test_debug_shows_where_an_error_comes_from(call: Call) -> None:
    with pytest.raises(slivo.RecipeError):
        cli.main(["run", "nothing.yaml", "--debug"])
    assert call("run", "nothing.yaml")[0] == 2


def test_a_folder_that_is_taken_or_cannot_be_written_is_refused(call: Call) -> None:
    Path("taken").mkdir()
    Path("taken/letter").write_text("dear")
    code, _, err = call("run", written(SHORT), "--out", "taken")
    assert code == 2
    assert "taken exists and is not empty" in err
    assert [file.name for file in Path("taken").iterdir()] == ["letter"]
    code, _, err = call("run", "recipe.yaml", "--out", "taken/letter/run")
    assert code == 2
    assert "cannot be written to" in err
    assert call("run", "recipe.yaml", "--out", "ok", "-q")[0] == 0
    code, _, err = call("run", "recipe.yaml", "--out", "ok")
    assert code == 2
    assert "--resume" in err


def test_a_target_that_is_missed_fails_and_leaves_everything(call: Call) -> None:
    code, out, err = call("run", written({**SHORT, "target": {"macs": 0.5, "bytes": 0.01}}), "--quiet")
    assert code == 1
    assert "missed: bytes is" in out
    assert err.startswith("error: the target was missed: bytes is")
    assert Path("runs/toy/report.html").exists()


def test_a_damaged_artifact_is_refused_and_says_which_file(call: Call, artifact: Path) -> None:
    import shutil

    shutil.copytree(artifact, "net")
    file = Path("net/model.safetensors")
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    for command in (("inspect", "net"), ("export", "net", "--out", "net.onnx")):
        code, _, err = call(*command)
        assert code == 1
        assert "net/model.safetensors is damaged: its checksum differs" in err
        assert len(err.splitlines()) <= 2
    assert not Path("net.onnx").exists()
    code, _, err = call("run", written({**SHORT, "teacher": {"model": "net"}}))
    assert code == 2
    assert "is damaged" in err


def test_a_report_can_be_made_anew(call: Call) -> None:
    call("run", written(SHORT), "--quiet", "--out", "x")
    page = Path("x/report.html")
    before = page.read_text()
    page.unlink()
    assert call("report", "x") == (0, "x/report.html\n", "")
    assert page.read_text() == before
    code, _, err = call("report", "nowhere")
    assert code == 1
    assert "nowhere has no run.json" in err


def test_inspect_shows_what_moves_together(call: Call, artifact: Path) -> None:
    for arguments in (("toys:net", "--arg", "width=8", "--input", "2,12"), (artifact,)):
        code, out, _ = call("inspect", *arguments)
        assert code == 0
        for text in ("first.0", "second.1.running_mean", "dim 0", "MACs that can be reached", "100.0 %", "none"):
            assert text in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inspect", "toys:net"), "give the shape of each input"),
        (("inspect", "toys:net", "--input", "2,x"), "'2,x' is no shape"),
        (("inspect", "toys:net", "--input", "2,0"), "'2,0' is no shape"),
        (("inspect", "toys:net", "--arg", "width", "--input", "2,12"), "'width' is not of the form key=value"),
        (("export", "net", "--to", "tflite"), "'tflite' is no format to export to; there is: onnx"),
        (("recipes", "--show", "x"), "'x' does not ship; there are: alternate, deep-compression"),
        (("run",), "give a recipe, or --resume with --out"),
        (("run", "--resume"), "give a recipe, or --resume with --out"),
        (("prune",), "No such command 'prune'"),
        (("demo", "--seeds", "0"), "Invalid value for '--seeds'"),
    ],
)
def test_wrong_usage_says_what_is_right(call: Call, arguments: tuple[str, ...], message: str) -> None:
    code, _, err = call(*arguments)
    assert code == 2
    assert message in " ".join(err.replace("│", " ").split())


def test_an_artifact_is_exported(call: Call, artifact: Path) -> None:
    code, out, _ = call("export", artifact, "--out", "net.onnx")
    assert (code, out) == (0, "net.onnx\n")
    assert Path("net.onnx").stat().st_size > 0


def test_an_artifact_is_packed_shown_and_unpacked(call: Call, artifact: Path) -> None:
    code, out, _ = call("pack", artifact, "net.slivo")
    assert code == 0
    for text in ("first.0.weight", "float32", "8×12", "dense", "header", "whole file", "bits each", "net.slivo: "):
        assert text in out
    assert f" {Path('net.slivo').stat().st_size} " in out
    assert call("unpack", "net.slivo") == (0, out, "")
    assert call("unpack", "net.slivo", "again") == (0, "again\n", "")
    for name in ("slivo.json", "model.safetensors"):
        assert Path("again", name).read_bytes() == (artifact / name).read_bytes()
    assert call("pack", "again")[0] == 0
    assert Path("again.slivo").read_bytes() == Path("net.slivo").read_bytes()


def test_a_packed_file_is_taken_for_an_artifact(call: Call, artifact: Path) -> None:
    call("pack", artifact, "net.slivo")
    code, out, _ = call("inspect", "net.slivo")
    assert code == 0
    assert "MACs that can be reached" in out
    assert call("export", "net.slivo", "--out", "net.onnx") == (0, "net.onnx\n", "")
    assert call("run", written({**SHORT, "teacher": {"model": "net.slivo"}}), "--quiet")[0] == 0
    file = Path("net.slivo")
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    for command in (("inspect", "net.slivo"), ("unpack", "net.slivo", "out")):
        code, out, err = call(*command)
        assert (code, out) == (1, "")
        assert "net.slivo: " in err
        assert " is damaged: " in err
        assert "; restore the file from a copy" in err
        assert len(err.splitlines()) == 1


def test_artifacts_are_timed_against_a_teacher_and_judged_where_they_run(call: Call) -> None:
    assert call("run", written(SHORT), "--out", "run", "--quiet")[0] == 0
    runtimes = ("--runtime", "eager", "--runtime", "onnxruntime", "--batch", 2, "--repeats", 5)
    code, out, err = call("bench", "run/student", "run/teacher", "--run", "run", *runtimes, "--json", "bench.json")
    assert (code, err) == (0, "")
    rows = json.loads(Path("bench.json").read_text(encoding="utf-8"))
    assert [(row["artifact"], row["runtime"], row["batch"]) for row in rows] == [
        (f"run/{name}", runtime, 2) for name in ("student", "teacher") for runtime in ("eager", "onnxruntime")
    ]
    quality = json.loads(Path("run/summary.json").read_text(encoding="utf-8"))["student"]["accuracy"]
    for row in rows[:2]:
        assert row["metrics"]["accuracy"] == pytest.approx(quality, abs=0.05)
        assert f"{row['faster']:.2f} x" in out
    code, out, _ = call("bench", "run/student", *runtimes)
    assert code == 0
    assert " x\n" not in out
    assert "threads" not in out
    assert call("bench", "run/student", "--runtime", "tvm")[::2] == (
        1,
        "error: 'tvm' is no runtime; there are eager, compile, onnxruntime, openvino\n",
    )


def test_what_there_is_comes_from_the_code(call: Call) -> None:
    assert "taylor" in call("criteria")[1]
    assert "temperature: float = 4.0" in call("losses")[1]
    assert "prune-then-distill" in call("recipes")[1]
    code, out, _ = call("recipes", "--show", "alternate")
    assert code == 0
    assert yaml.safe_load(out)["stages"][0]["repeat"]["times"] > 1
    assert json.loads(call("recipes", "--schema")[1])["title"] == "A recipe of slivo"
    assert call("--version")[1] == f"slivo {slivo.__version__}\n"


def start(*arguments: str, folder: Path) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(TESTS.parent / "src"), str(TESTS)])
    return subprocess.Popen(
        [sys.executable, "-m", "slivo", *arguments],
        cwd=folder, env={**os.environ, "PYTHONPATH": path}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        # A shell that starts the tests in the background has told them, and their children, to ignore interrupts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def wait_for(file: Path, process: subprocess.Popen[str]) -> None:
    """Wait until a training has written some epochs, or the process is dead."""
    while process.poll() is None and not (file.exists() and len(file.read_text().splitlines()) > 5):
        time.sleep(0.02)


def test_help_comes_without_waiting_for_pytorch() -> None:
    code = "import sys, slivo.cli as c\ntry: c.main(['run', '--help'])\nexcept SystemExit: print(sorted(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--resume" in result.stdout
    assert "'torch'" not in result.stdout


def test_an_interrupt_says_how_to_go_on_and_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(LONG))
    process = start("run", "recipe.yaml", "--out", "x", folder=tmp_path)
    wait_for(tmp_path / "x" / "metrics.jsonl", process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err == "error: interrupted; go on with: slivo run --resume --out x\n"
    assert json.loads((tmp_path / "x" / "run.json").read_text())["error"] == "interrupted"
    before = len((tmp_path / "x" / "metrics.jsonl").read_text().splitlines())
    process = start("run", "--resume", "--out", "x", folder=tmp_path)
    while process.poll() is None and len((tmp_path / "x" / "metrics.jsonl").read_text().splitlines()) <= before:
        time.sleep(0.02)
    process.kill()  # no warning at all this time
    process.communicate()
    rows = [json.loads(line) for line in (tmp_path / "x" / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows if row["stage"] == 1] == list(range(1, len(rows) - 2))
    assert json.loads((tmp_path / "x" / "run.json").read_text())["status"] == "running"


def test_a_signal_within_a_long_epoch_loses_no_step(tmp_path: Path) -> None:
    slow = {"kind": "image-classification", "data": "toys:slow_task"}
    recipe = toys.recipe(
        {"finetune": {"epochs": 2, "batch_size": 4}}, task=slow, teacher={"model": "toys:net"}, target={}
    )
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    process = start("run", "recipe.yaml", "--out", "x", folder=tmp_path)
    checkpoints = tmp_path / "x" / "checkpoints"
    while process.poll() is None and not (checkpoints / "001.fit").exists():
        time.sleep(0.02)
    time.sleep(1)  # the training's first steps
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert err == "error: interrupted; go on with: slivo run --resume --out x\n"
    stored = read(checkpoints / "001.fit.inside")
    assert (stored["epoch"], stored["history"]) == (1, [])
    assert stored["inside"]["batches"] == stored["step"] > 0
    assert sorted(file.name for file in (tmp_path / "x").iterdir()) == [
        "checkpoints",
        "metrics.jsonl",
        "run.json",
        "teacher",
    ]


def test_a_model_that_rejects_its_inputs_fails_in_one_line(tmp_path: Path) -> None:
    process = start("inspect", "toys:net", "--input", "2,5", folder=tmp_path)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith("error: Net fails on the example inputs (float32[2, 5])")


def test_threads_wait_without_spinning_unless_told_otherwise() -> None:
    code = (
        "import os, slivo.cli as c\ntry: c.main(['--version'])\nexcept SystemExit: print(os.environ['OMP_WAIT_POLICY'])"
    )
    for given, expected in ((None, "passive"), ("active", "active")):
        environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
        environment |= {} if given is None else {"OMP_WAIT_POLICY": given}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == expected
