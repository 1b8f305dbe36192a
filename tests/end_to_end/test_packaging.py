"""A wheel built from the clone works in an environment of its own, away from the clone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE_DATA = {".typed", ".j2", ".html", ".json"}

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command without the clone on the module path, and return what it printed."""
    environment = {key: value for key, value in os.environ.items() if key not in {"PYTHONPATH", "PYTHONHOME"}}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def copy_project(target: Path) -> Path:
    """A clean copy of the project's files, the link included: what git has or would add."""
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    for name in listed.split("\0"):
        if name and os.path.lexists(ROOT / name):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name, follow_symlinks=False)
    return target


def build_wheel(project: Path, target: Path) -> Path:
    run(
        *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-input", "--no-deps", "--no-build-isolation"),
        *("--wheel-dir", target, project),
        cwd=target.parent,
    )
    (wheel,) = target.glob("fxfusion-*.whl")
    return wheel


def build_wheel_by_sdist(project: Path, target: Path) -> Path:
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(target)!r})"
    run(sys.executable, "-c", build, cwd=project)
    (archive,) = target.glob("fxfusion-*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(target)
    return build_wheel(target / archive.name.removesuffix(".tar.gz"), target)


def files_of(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as opened:
        return {name for name in opened.namelist() if ".dist-info/" not in name}


def expected_files(project: Path) -> set[str]:
    """Each module and data file of the tree, under the name that it has when installed."""
    found = {
        path.relative_to(project)
        for folder in ("fxfusion", "passes")
        for path in (project / folder).rglob("*")
        if path.suffix in {".py", *PACKAGE_DATA} and path.is_file()
    }
    return {(path if path.parts[0] == "fxfusion" else Path("fxfusion", path)).as_posix() for path in found}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def wheel(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(project, tmp_path_factory.mktemp("wheel") / "out")


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty environment with the wheel; its dependencies come from the running environment.

    The path is added by a `.pth` file, after the wheel's own folder. `.pth` files in the added folder,
    such as that of an editable fxfusion, are not read.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    run(
        *(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-input"),
        *("--no-deps", "--no-index", wheel),
        cwd=folder,
    )
    (site,) = folder.rglob("site-packages")
    here = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    (site / "dependencies.pth").write_text("\n".join(here) + "\n", "utf-8")
    return folder


IMPORT_ALL = """
import json, pkgutil, importlib, importlib.metadata as metadata
import fxfusion

def fail(name):
    raise

modules = [m.name for m in pkgutil.walk_packages(fxfusion.__path__, "fxfusion.", onerror=fail)]
files = {"fxfusion": fxfusion.__file__}
for name in modules:
    if not name.endswith(".__main__"):
        files[name] = importlib.import_module(name).__file__
mine = metadata.distribution("fxfusion").entry_points
print(json.dumps({
    "files": files,
    "backends": [e.name for e in mine if e.group == "torch_dynamo_backends" and callable(e.load())],
    "scripts": [e.name for e in mine if e.group == "console_scripts" and callable(e.load())],
}))
"""


def test_wheel_holds_every_module_and_data_file(project: Path, wheel: Path) -> None:
    expected = expected_files(project)
    assert "fxfusion/passes/__init__.py" in expected
    assert files_of(wheel) == expected


def test_wheel_by_sdist_holds_the_same_files(project: Path, wheel: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert files_of(build_wheel_by_sdist(project, tmp_path / "out")) == files_of(wheel)


def test_wheel_of_a_checkout_without_links_holds_the_same_files(wheel: Path, tmp_path: Path) -> None:
    project = copy_project(tmp_path / "project")
    (project / "fxfusion/passes").unlink()
    (project / "fxfusion/passes").write_text("../passes", "utf-8")
    assert files_of(build_wheel(project, tmp_path / "out")) == files_of(wheel)


def test_every_module_imports_from_the_installed_wheel(environment: Path) -> None:
    scripts = environment / ("Scripts" if os.name == "nt" else "bin")
    found = json.loads(run(scripts / "python", "-c", IMPORT_ALL, cwd=environment).splitlines()[-1])
    outside = [file for file in found["files"].values() if not Path(file).is_relative_to(environment)]
    assert not outside, "imported from elsewhere"
    assert {"fxfusion.backend", "fxfusion.cli", "fxfusion.graph", "fxfusion.passes"} <= set(found["files"])
    assert found["backends"] == ["ffn_fusion"]
    assert found["scripts"] == ["fxfusion"]
    assert "fxfusion" in run(scripts / "fxfusion", "--help", cwd=environment)
