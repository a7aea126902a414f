"""What holds for the package as a whole."""

import subprocess
import sys
import warnings

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
