"""The wheel: what is in it, what it asks for, and that it works away from the checkout."""

from __future__ import annotations

import email.message
import email.parser
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import edgesam_deploy
from edgesam_deploy.bundle import load_bundle, shipped_bundle
from edgesam_deploy.recipe import load_recipe

pytest.importorskip("hatchling", reason="building a wheel needs hatchling")

REPOSITORY = Path(__file__).resolve().parent.parent
# What a working checkout collects and no wheel may carry.
STRAY = (
    "engines/cpu/reference-int8/encoder.onnx",
    "engines/cpu/reference-int8/manifest.json",
    "engines/cpu/.stages/reference-int8/export/encoder.onnx",
    "edgesam_deploy/__pycache__/bundle.cpython-311.pyc",
    "edgesam_deploy/.mypy_cache/x.json",
    "build/lib/edgesam_deploy/bundle.py",
    "dist/edgesam_deploy-0.0.0-py3-none-any.whl",
    ".venv/lib/python/site-packages/click.py",
)


def _link(source: str, target: str) -> None:
    """A hard link where the file system allows one."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this checkout, with stray files lying about in it."""
    checkout = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE", ".gitignore"):
        if (REPOSITORY / name).exists():
            shutil.copyfile(REPOSITORY / name, checkout / name)
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("edgesam_deploy", "export"):
        shutil.copytree(REPOSITORY / name, checkout / name, copy_function=_link, ignore=ignored)
    (checkout / "engines").mkdir()
    for path in (REPOSITORY / "engines").glob("*.toml"):
        shutil.copyfile(path, checkout / "engines" / path.name)
    for name in STRAY:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text("stray")
    folder = tmp_path_factory.mktemp("dist")
    command = "import sys; from hatchling.build import build_wheel; build_wheel(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", command, str(folder)],
        cwd=checkout,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return email.parser.Parser().parsestr(archive.read(name).decode())


def test_the_wheel_is_pure_python(wheel: Path) -> None:
    assert wheel.name == f"edgesam_deploy-{edgesam_deploy.__version__}-py3-none-any.whl"


@pytest.mark.parametrize("pattern", ["export/*.toml", "engines/*.toml"])
def test_recipes_and_targets_travel_inside_the_package(names: set[str], pattern: str) -> None:
    expected = {f"edgesam_deploy/{p.relative_to(REPOSITORY).as_posix()}" for p in REPOSITORY.glob(pattern)}
    assert expected
    assert expected <= names


@pytest.mark.parametrize(
    "name",
    [
        "edgesam_deploy/py.typed",
        "edgesam_deploy/assets/photos/SOURCES.md",
        "edgesam_deploy/assets/reference.pt",
        "edgesam_deploy/assets/bundles/reference-int8/manifest.json",
        "edgesam_deploy/assets/bundles/reference-int8/encoder.onnx",
        "edgesam_deploy/assets/bundles/reference-int8/decoder.onnx",
        "edgesam_deploy/assets/bundles/reference-int8/verify/answers.npz",
    ],
)
def test_what_the_package_needs_at_run_time_is_there(names: set[str], name: str) -> None:
    assert name in names


@pytest.mark.parametrize("folder", ["calibration", "verify"])
def test_every_photograph_is_there(names: set[str], folder: str) -> None:
    photos = REPOSITORY / "edgesam_deploy" / "assets" / "photos" / folder
    expected = {f"edgesam_deploy/assets/photos/{folder}/{p.name}" for p in photos.iterdir()}
    assert expected
    assert expected <= names


def test_every_module_is_there(names: set[str]) -> None:
    package = REPOSITORY / "edgesam_deploy"
    assert {p.relative_to(REPOSITORY).as_posix() for p in package.rglob("*.py")} <= names


@pytest.mark.parametrize("name", ["LICENSE", "NOTICE"])
def test_the_licence_travels_along(names: set[str], metadata: email.message.Message, name: str) -> None:
    assert name in metadata.get_all("License-File", [])
    assert any(n.endswith(f".dist-info/licenses/{name}") for n in names)


def test_nothing_else_is_in_the_wheel(names: set[str]) -> None:
    """Only the package and its metadata; in it the code, the assets and the two folders of TOMLs."""
    ours = {n for n in names if not re.match(r"edgesam_deploy-[^/]+\.dist-info/", n)}
    assert {n.partition("/")[0] for n in ours} == {"edgesam_deploy"}
    kinds = re.compile(r"edgesam_deploy/(py\.typed|assets/.+|(export|engines)/[^/]+\.toml|(\w+/)*\w+\.py)")
    assert [n for n in ours if not kinds.fullmatch(n)] == []


RUNTIME = {"click", "numpy", "pillow", "rich", "tomli"}
EXTRAS = {"cpu", "export", "eval", "dev"}


def test_the_base_install_is_small(metadata: email.message.Message) -> None:
    """What a device must install: no torch, no ONNX tools, no runtime that it did not choose."""
    required = metadata.get_all("Requires-Dist", [])
    base = {r for r in required if "extra ==" not in r}
    assert {re.split(r"[^\w-]", r)[0] for r in base} == RUNTIME
    (tomli,) = (r for r in base if r.startswith("tomli"))
    assert re.search(r"python_version\s*<\s*['\"]3\.11['\"]", tomli)
    assert metadata["Requires-Python"] == ">=3.10"


def test_the_extras_are_those_that_error_messages_name(metadata: email.message.Message) -> None:
    """MissingExtraError says ``pip install 'edgesam-deploy[NAME]'``; pip ignores a NAME there is not."""
    extras = set(metadata.get_all("Provides-Extra", []))
    assert extras >= EXTRAS
    named: set[str] = set()
    for path in (REPOSITORY / "edgesam_deploy").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        named |= set(re.findall(r"MissingExtraError\([^()]*(?:\([^()]*\))?[^()]*\"(\w+)\"\)", text))
        named |= set(re.findall(r"edgesam-deploy\[(\w+)\]", text))
    assert {"cpu", "export"} <= named
    assert named <= extras


def test_the_command_is_declared(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("entry_points.txt"))
        assert "sam-export = edgesam_deploy.cli:main" in archive.read(name).decode()


INSTALLED = """
from pathlib import Path
import edgesam_deploy
from edgesam_deploy.recipe import available_recipes, data_folder, load_recipe
from edgesam_deploy.target import available_targets, load_target

package = Path(edgesam_deploy.__file__).parent
assert data_folder("export") == package / "export", data_folder("export")
assert data_folder("engines") == package / "engines", data_folder("engines")
for name in available_recipes():
    load_recipe(name)
for name in available_targets():
    load_target(name)
bundle = edgesam_deploy.load_bundle(edgesam_deploy.shipped_bundle())
assert bundle.path.is_relative_to(package), bundle.path
print(package, *available_recipes(), *available_targets())
"""


def test_away_from_the_checkout_it_finds_its_recipes_targets_and_bundle(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    done = subprocess.run(
        [sys.executable, "-c", INSTALLED],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    package, *found = done.stdout.split()
    assert Path(package) == tmp_path / "site" / "edgesam_deploy"
    expected = [p.stem for kind in ("export", "engines") for p in sorted((REPOSITORY / kind).glob("*.toml"))]
    assert found == expected


def test_the_shipped_bundle_is_of_the_shipped_recipe_and_weights() -> None:
    bundle, recipe = load_bundle(shipped_bundle()), load_recipe("reference")
    assert bundle.recipe == recipe.name
    assert bundle.manifest["recipe"]["digest"] == recipe.digest
    assert bundle.manifest["checkpoint_sha256"] == recipe.checkpoint.sha256
    assert (bundle.geometry, bundle.pixels) == (recipe.geometry, recipe.pixels)
    assert bundle.verified


PUBLIC = {"Bundle", "Prediction", "Predictor", "load_bundle", "read_image", "shipped_bundle"}


def test_public_names_are_sorted_and_there() -> None:
    assert set(edgesam_deploy.__all__) >= PUBLIC
    assert list(edgesam_deploy.__all__) == sorted(edgesam_deploy.__all__)
    assert len(set(edgesam_deploy.__all__)) == len(edgesam_deploy.__all__)


@pytest.mark.parametrize("name", edgesam_deploy.__all__)
def test_a_public_name_is_the_thing_itself(name: str) -> None:
    """The same object as in its own module, and documented."""
    thing = getattr(edgesam_deploy, name)
    assert getattr(sys.modules[thing.__module__], name) is thing
    assert thing.__module__.startswith("edgesam_deploy.")
    assert thing.__doc__


def test_a_name_there_is_not_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'load_bundel'"):
        edgesam_deploy.load_bundel  # noqa: B018 - the access is the test
    with pytest.raises(ImportError, match="load_bundel"):
        from edgesam_deploy import load_bundel  # noqa: F401
