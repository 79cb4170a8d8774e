"""What must be true of any saved model: a fresh process makes of it the same outputs, to the bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracles.permutation import outputs
from safetensors.torch import load_file, save_file
from zoo import ZOO, build, double

import slivo
from slivo.graph import Call, as_args

READER = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
import slivo
from zoo import ZOO
from oracles.permutation import outputs
from slivo.graph import Call
for folder in sorted(Path(sys.argv[1]).iterdir()):
    # Cloned, because tensors mapped from a file are not aligned as PyTorch's are, and kernels round differently there.
    given = {key: value.clone() for key, value in load_file(folder / "inputs.safetensors").items()}
    args = [given[key] for key in sorted(given) if key.isdigit()]
    call = Call(tuple(args), {key: value for key, value in given.items() if not key.isdigit()})
    make = ZOO[folder.name][0]
    model = slivo.load(folder / "model", factory=lambda: make().double())
    save_file({str(i): each.contiguous() for i, each in enumerate(outputs(model, call))}, folder / "got.safetensors")
"""


@pytest.fixture(scope="module")
def read_back(tmp_path_factory):
    """Prune and save every network of the zoo, then load all of them in one new process."""
    root = tmp_path_factory.mktemp("artifacts")
    expected = {}
    for name in ZOO:
        model, inputs = build(name)
        small = slivo.prune(model, inputs, keep=slivo.Budget(params=0.7)).eval()
        (root / name).mkdir()
        slivo.save(small, root / name / "model")
        args, kwargs = as_args(double(inputs))
        save_file({**{str(i): each for i, each in enumerate(args)}, **kwargs}, root / name / "inputs.safetensors")
        expected[name] = outputs(small, Call(args, kwargs))
    tests = Path(__file__).parents[1]
    path = ":".join([str(tests), str(tests.parent / "src")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run([sys.executable, "-c", READER, str(root)], check=True, env=environment)
    return root, expected


@pytest.mark.parametrize("name", sorted(ZOO))
def test_a_new_process_computes_the_same_bits(read_back, name):
    root, expected = read_back
    got = load_file(root / name / "got.safetensors")
    assert len(got) == len(expected[name])
    assert all(torch.equal(got[str(index)], each) for index, each in enumerate(expected[name]))
