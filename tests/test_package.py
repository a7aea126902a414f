"""What holds for the package as a whole."""

import sys
import warnings

import pytest

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
    with pytest.raises(ImportError, match=rf"flying needs {reason}.*speechbrain_mrl\[wings\]"):
        require(module, "wings", "flying")
