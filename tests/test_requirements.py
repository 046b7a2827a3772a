"""The locks: every line has a version and checksums, the set is closed, and pip refuses a file that was changed."""

from __future__ import annotations

import functools
import hashlib
import itertools
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from conftest import ROOT

requirements = pytest.importorskip("packaging.requirements", reason="reading requirements needs packaging (in requirements.lock)")
APART = {"torch"}  # its CPU and CUDA builds differ
LOCKS = ("requirements.lock", "requirements-smollm2.lock")


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def entries(text: str) -> dict[str, tuple[str, list[str]]]:
    """{package: (version, hashes)} of a lock; a line that is no such entry fails."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    found = {}
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        entry = re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][0-9A-Za-z.]*)((?: +--hash=sha256:[0-9a-f]{64})+)", line)
        assert entry, line
        assert plain(entry[1]) not in found, line
        found[plain(entry[1])] = entry[2], re.findall(r"[0-9a-f]{64}", entry[3])
    return found


@pytest.mark.parametrize("lock", LOCKS)
def test_every_line_has_a_version_and_checksums(lock):
    text = (ROOT / lock).read_text(encoding="utf-8")
    found = entries(text)
    assert found and not APART & set(found) and "://" not in text  # nobody's registry
    hashes = list(itertools.chain.from_iterable(hashes for _, hashes in found.values()))
    assert len(hashes) == len(set(hashes))


def test_a_line_without_a_checksum_is_seen():
    for line in ("a==1.0", "a>=1 --hash=sha256:" + "0" * 64, "a==1.0 --hash=sha256:12", "a==1.0 --hash=md5:" + "0" * 32):
        with pytest.raises(AssertionError):
            entries(line)


def pyproject() -> list:
    """What pyproject.toml asks for: dependencies, the extras that the lock serves, and what builds dpgbench."""
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = asked["project"]["optional-dependencies"]
    assert set(extras) == {"dev", "smollm2", "vllm", "slurm"}  # vllm brings CUDA and pins torch: not in the lock
    words = [*asked["project"]["dependencies"], *extras["dev"], *extras["smollm2"], *extras["slurm"], *asked["build-system"]["requires"]]
    return [requirements.Requirement(word) for word in words]


def test_the_lock_has_what_pyproject_asks_for():
    locked = entries((ROOT / "requirements.lock").read_text(encoding="utf-8"))
    for asked in pyproject():
        if plain(asked.name) not in APART:
            assert plain(asked.name) in locked, f"{asked.name}: not in requirements.lock"
            assert locked[plain(asked.name)][0] in asked.specifier, f"{asked}: the lock has {locked[plain(asked.name)][0]}"


@functools.cache
def needs_of(name: str) -> list:
    return [requirements.Requirement(need) for need in metadata.requires(name) or []]


PLATFORMS = [("linux", "Linux", "x86_64"), ("linux", "Linux", "aarch64"), ("darwin", "Darwin", "arm64")]


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13", "3.14"])
def test_the_lock_is_closed(version):
    """`--no-deps` installs what is written and nothing else, so all that a package needs must be written, on every platform.

    Read from the metadata of what is installed here, which is the same in all of a version's wheels but torch's (CUDA).
    """
    from packaging.markers import default_environment

    locked = entries((ROOT / "requirements.lock").read_text(encoding="utf-8"))
    for system, platform, machine in PLATFORMS:
        here = {"sys_platform": system, "platform_system": platform, "platform_machine": machine, "os_name": "posix"}
        environment = default_environment() | here | {"python_version": version, "python_full_version": f"{version}.1"}
        todo = [(name, "") for name in [*locked, *APART]]
        todo += [(plain(asked.name), extra) for asked in pyproject() for extra in asked.extras]
        seen = set()
        while todo:
            name, extra = todo.pop()
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            try:
                needs = needs_of(name)
            except metadata.PackageNotFoundError:
                pytest.skip(f"{name} of the lock is not installed here")
            for need in needs:
                if need.marker is None or need.marker.evaluate(environment | {"extra": extra}):
                    other = plain(need.name)
                    assert other in locked or other in APART, f"{name} needs {need}, {platform} {version}: not in the lock"
                    assert other in APART or locked[other][0] in need.specifier, f"{name} needs {need}; the lock has {locked[other][0]}"
                    todo += [(other, wanted) for wanted in need.extras or ("",)]


def test_the_ways_to_install_agree():
    """Makefile and README: hashes, nothing resolved, and the same torch."""
    makefile, readme = ((ROOT / name).read_text(encoding="utf-8") for name in ("Makefile", "README.md"))
    for text in (makefile, readme):
        installed = re.findall(r"pip install (.*-r \S+)", text)
        assert installed and all("--require-hashes --no-deps" in words for words in installed), installed
    assert re.findall(r"torch==(\S+)", makefile) == re.findall(r"torch==(\S+)", readme) and len(re.findall(r"torch==", makefile)) == 1


def wheel(folder: Path) -> Path:
    """The smallest package that pip installs."""
    path = folder / "tiny_thing-1.0-py3-none-any.whl"
    about = "tiny_thing-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_thing.py", "")
        archive.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: tiny-thing\nVersion: 1.0\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nGenerator: none\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    return path


@pytest.mark.parametrize("changed", ["nothing", "the lock", "the file", "no hash"])
def test_pip_refuses_a_file_whose_checksum_is_another(tmp_path, changed):
    """As the Makefile calls it, but from a folder and without a network."""
    pytest.importorskip("pip", reason="a test of pip")
    path = wheel(tmp_path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if changed == "the lock":
        digest = f"{int(digest[0], 16) ^ 1:x}{digest[1:]}"
    if changed == "the file":
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("more.py", "import os")
    hashed = "" if changed == "no hash" else f" \\\n    --hash=sha256:{digest}"
    (tmp_path / "lock").write_text(f"tiny-thing==1.0{hashed}\n")
    (words,) = re.findall(r"pip install --quiet (.*) -r requirements\.lock", (ROOT / "Makefile").read_text(encoding="utf-8"))
    pip = [sys.executable, "-m", "pip", "--isolated", "--disable-pip-version-check", "install", *words.split()]
    offline = ["--no-index", "--find-links", str(tmp_path), "--target", str(tmp_path / "site"), "-r", str(tmp_path / "lock")]
    done = subprocess.run([*pip, *offline], capture_output=True, text=True, timeout=120)
    if changed == "nothing":
        assert done.returncode == 0 and (tmp_path / "site" / "tiny_thing.py").exists(), done.stderr
    else:
        assert done.returncode != 0 and not (tmp_path / "site").exists(), done.stderr
        assert ("Hashes are required" if changed == "no hash" else "DO NOT MATCH THE HASHES") in done.stderr, done.stderr
