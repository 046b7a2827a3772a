"""What a cell was computed with and on."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

from dpgbench import __version__
from dpgbench.core.paths import home


def environment() -> dict[str, Any]:
    """What the numbers were made with: versions, git commit, device, processor. No name of a host, no path, no variable."""
    import torch

    scores = ("alt-profanity-check", "scikit-learn", "lexicalrichness", "py3langid", "rapidfuzz", "zxing-cpp")  # read the texts
    packages = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "tokenizers", "numpy", *scores)
    return {
        "dpgbench": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in packages},
        "machine": platform.machine(),
        "processor": {"model": _processor(), "vectors": torch.backends.cpu.get_cpu_capability()},  # both decide a sum's last bits
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def _processor() -> str:
    """What the kernel calls it; else what Python knows, perhaps nothing."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def _version(package: str) -> str | None:
    """None where it is not installed, which whoever needs it says: a machine that runs one task may lack what another one reads with."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> str:
    """The checkout's commit, with "+changes" if the tree is not clean; "" outside a checkout of dpgbench. Of pinned code, what it was."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(home()), *words]
        return subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=20).stdout.strip()

    try:
        if (home() / "COMMIT").exists():
            return (home() / "COMMIT").read_text(encoding="utf-8")
        if not (home() / ".git").exists():
            return ""
        changed = git("status", "--porcelain", "--", "dpgbench", "methods", "tasks", "configs")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.TimeoutExpired):
        return ""
