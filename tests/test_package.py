"""What holds for the package as a whole."""

import ast
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import speechbrain_mrl
from speechbrain_mrl.utils import require


@pytest.mark.parametrize("module", ["speechbrain_mrl", "speechbrain_mrl.losses"])
def test_a_deprecation_warning_of_our_own_code_is_an_error(module):
    with pytest.raises(DeprecationWarning, match="old way"):
        warnings.warn_explicit("old way", DeprecationWarning, "file.py", 1, module=module)


@pytest.mark.parametrize(
    "module, reason",
    [
        ("half_there.absent", "half_there.absent, which is not installed"),
        ("half_there", r"half_there, which cannot be imported \(No module named 'its_own_need'\)"),
    ],
)
def test_an_extra_that_is_there_and_broken_is_not_called_missing(
    tmp_path, monkeypatch, module, reason
):
    (tmp_path / "half_there").mkdir()
    broken = "" if "." in module else "import its_own_need\n"
    (tmp_path / "half_there" / "__init__.py").write_text(broken)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "half_there", raising=False)
    with pytest.raises(ImportError, match=rf"flying needs {reason}.*pip install wings"):
        require(module, "flying", "wings")


def test_every_public_name_is_there_and_says_what_it_is():
    for name in speechbrain_mrl.__all__:
        assert getattr(speechbrain_mrl, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'MatryoshkaIndices'"):
        _ = speechbrain_mrl.MatryoshkaIndices


def test_importing_the_package_does_not_import_what_comes_on_first_use():
    code = "import sys, speechbrain_mrl as s; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = set(done.stdout.split())
    later = {f"speechbrain_mrl.{module}" for module in speechbrain_mrl._ON_FIRST_USE.values()}
    assert not modules & (later | {"torch", "speechbrain"}), modules


def imported(root, path):
    """Modules that a file below ``root`` names in imports, those inside of functions too."""
    for node in ast.walk(ast.parse((root / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            parents = path.parts[: -node.level] if node.level else ()
            yield ".".join([*parents, *([node.module] if node.module else [])])
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_imports_go_down_the_table_in_contributing():
    root = Path(speechbrain_mrl.__file__).parents[1]
    text = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    level = {
        place.strip("/").removesuffix(".py"): number
        for number, row in enumerate(rows)
        for place in re.findall(r"`([^`]+)`", row)
    }
    below = 0
    for path in (root / "speechbrain_mrl").rglob("*.py"):
        own = path.relative_to(root)
        room = own.with_suffix("").parts[1]
        for name in imported(root, own) if not room.startswith("__") else ():
            if name.startswith("speechbrain_mrl."):
                below += 1
                assert level[name.split(".")[1]] >= level[room], f"{own} imports {name}"
    assert below > 100
