"""Two gloo processes under torchrun: the rewards of one process, in both; disagreement is refused in both."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as distributed
from conftest import ROOT
from safetensors.torch import load_file, save_file
from test_metagrad import OPTIMIZERS, held_out, norm
from test_training import relative_error, tiny_batch, tiny_gpt2

from dpgbench.metagrad import metagradients

BATCHES = [tiny_batch(size, seed=size) for size in (3, 4, 1, 2)]  # shares of unequal size, and one process without any
WEIGHTS = torch.linspace(0.5, 1.5, 10, dtype=torch.float64)
CASES = {
    "tape": {}, "forward": {"mode": "forward"}, "reverse": {"mode": "reverse", "micro_batch": 1},
    "lean": {"checkpoint": "sqrt", "memory_budget": 0, "micro_batch": 1, "offload": "disk"},
}  # fmt: skip
SIGNALS = {"held-out": held_out, "norm": norm}

SCRIPT = """
import sys
import torch
import torch.distributed as distributed
from safetensors.torch import save_file
sys.path[:0] = sys.argv[2:]
from test_data_parallel import BATCHES, CASES, OPTIMIZERS, SIGNALS, WEIGHTS, metagradients, tiny_gpt2
torch.set_num_threads(1)
distributed.init_process_group("gloo")
rank, found = distributed.get_rank(), {}
for optimizer in OPTIMIZERS:
    for metric, signal in SIGNALS.items():
        for case, options in CASES.items():
            out = metagradients(tiny_gpt2(), BATCHES, signal, OPTIMIZERS[optimizer], weights=WEIGHTS, data_parallel=True, **options)
            found[f"{optimizer} {metric} {case}"] = out.rewards
save_file(found, f"{sys.argv[1]}/rank{rank}.safetensors")
for what, arguments in {"batches": (tiny_gpt2(), BATCHES[rank:]), "parameters": (tiny_gpt2(seed=rank), BATCHES)}.items():
    try:
        metagradients(*arguments, SIGNALS["norm"], OPTIMIZERS["sgd"], data_parallel=True)
    except ValueError as error:
        assert f"the {what} of rank 1 are not those of rank 0: every process must be given the same" in str(error), error
    else:
        raise AssertionError(f"different {what} were accepted")
distributed.destroy_process_group()
"""


def test_two_forks_equal_one_process(tmp_path):
    """One case of those below, without the seconds that processes take to import."""
    options = {"weights": WEIGHTS, "mode": "reverse", "micro_batch": 1}
    rewards = metagradients(tiny_gpt2(), BATCHES, held_out, OPTIMIZERS["adamw"], **options).rewards
    forks = [fork(rank, tmp_path, options) for rank in (0, 1)]
    assert [os.waitpid(pid, 0)[1] for pid in forks] == [0, 0]
    ranks = [load_file(tmp_path / f"rank{rank}.safetensors")["rewards"] for rank in (0, 1)]
    assert torch.equal(*ranks) and relative_error(ranks[0], rewards) < 1e-12


def fork(rank: int, folder, options: dict) -> int:
    """A copy of this process that computes as one of two, and its pid."""
    pid = os.fork()
    if pid == 0:
        try:
            meet = f"file://{folder / 'meet'}"
            distributed.init_process_group("gloo", meet, datetime.timedelta(seconds=60), rank=rank, world_size=2)
            out = metagradients(tiny_gpt2(), BATCHES, held_out, OPTIMIZERS["adamw"], data_parallel=True, **options)
            save_file({"rewards": out.rewards}, folder / f"rank{rank}.safetensors")
            os._exit(0)
        finally:
            os._exit(1)
    return pid


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    """To 1e-12 in float64, for both optimizers, a dense and a head-only metric, and every way to differentiate a step."""
    script = tmp_path / "two.py"
    script.write_text(SCRIPT)
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, tmp_path, ROOT, ROOT / "tests"]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [load_file(tmp_path / f"rank{rank}.safetensors") for rank in (0, 1)]
    assert len(ranks[0]) == len(OPTIMIZERS) * len(SIGNALS) * len(CASES)
    for name, rewards in ranks[0].items():
        optimizer, metric, _ = name.split()
        alone = metagradients(tiny_gpt2(), BATCHES, SIGNALS[metric], OPTIMIZERS[optimizer], weights=WEIGHTS).rewards
        assert torch.equal(rewards, ranks[1][name]) and relative_error(rewards, alone) < 1e-12, name
