"""What holds for the package as a whole."""

import warnings

import pytest


@pytest.mark.parametrize("module", ["speechbrain_mrl", "speechbrain_mrl.losses"])
def test_a_deprecation_warning_of_our_own_code_is_an_error(module):
    with pytest.raises(DeprecationWarning, match="old way"):
        warnings.warn_explicit("old way", DeprecationWarning, "file.py", 1, module=module)
