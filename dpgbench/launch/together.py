"""One cell in several processes of a node, a GPU each, for a launcher whose workers are processes: a worker that starts torchrun.

torchrun starts this module (`main`) in every process. What to run and how it ended go through a folder of the worker's own, because only
the worker knows the cell, and only the first of torchrun's processes knows the state.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dpgbench.core.cell import RunSpec
from dpgbench.core.interrupts import Stop
from dpgbench.launch.local import death, output_into
from dpgbench.store.run_folder import RunFolder

LOOK_SECONDS = 0.2


def work(spec: RunSpec, results: Path, plugins: Path | None, checkpoint_seconds: float, processes: int, patience_seconds: float) -> str:
    """As `local.work`, by so many processes. Asked to stop, they have `patience_seconds` for a checkpoint before torchrun kills them."""
    folder = RunFolder.of(results, spec)
    with Stop.on_signals() as stop, output_into(folder.path / "log.txt"), tempfile.TemporaryDirectory() as exchange:
        order = {
            "config": dict(spec.config), "results": str(results), "plugins": plugins and str(plugins),
            "checkpoint_seconds": checkpoint_seconds,
        }  # fmt: skip
        (Path(exchange) / "order.json").write_text(json.dumps(order), encoding="utf-8")
        started = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m", __name__, exchange]
        environment = os.environ | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(int(patience_seconds))}
        torchrun = subprocess.Popen([sys.executable, *started], env=environment)
        asked = False
        while torchrun.poll() is None:
            time.sleep(LOOK_SECONDS)
            if stop.asked and not asked:
                asked = True
                torchrun.terminate()  # who passes it on to all
        state = Path(exchange) / "state"
        if state.exists():
            return state.read_text(encoding="utf-8")
        return "interrupted" if asked else folder.fail_unless_owned(death(torchrun.returncode))


def main(exchange: Path) -> None:
    """One of torchrun's processes."""
    from dpgbench.bench import distributed
    from dpgbench.run.cell import run_cell

    order = json.loads((exchange / "order.json").read_text(encoding="utf-8"))
    plugins = Path(order["plugins"]) if order["plugins"] else None
    group = distributed.start()
    state = run_cell(RunSpec(order["config"]), Path(order["results"]), plugins, checkpoint_seconds=order["checkpoint_seconds"], group=group)
    if group.first:
        (exchange / "state").write_text(state, encoding="utf-8")
    if state == "done":
        group.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
