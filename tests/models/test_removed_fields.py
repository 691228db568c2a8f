"""Fields that configurations no longer have are passed over where they changed nothing, and refused where they acted."""

import pytest

from tokcom_hf.models.shared_removed_fields import take_removed

FORMER = {"momentum": 0.9, "levels": None}


def test_former_defaults_are_taken_out_and_the_rest_stays():
    given = {"momentum": 0.9, "width": 3}
    assert take_removed(given, FORMER) == ["momentum"]
    assert given == {"width": 3}
    assert take_removed(given, FORMER) == []


def test_other_values_are_refused_by_name_with_the_version_that_reads_them():
    with pytest.raises(ValueError, match=r"momentum=0\.5, levels=\[8\], which was removed.* reads it is 0\.2\.0"):
        take_removed({"momentum": 0.5, "levels": [8]}, FORMER)
    with pytest.raises(ValueError, match=r"reads it is 0\.1\.0"):
        take_removed({"momentum": 1}, FORMER, "0.1.0")
