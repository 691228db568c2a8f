"""Fields that configurations no longer have are passed over where they changed nothing, and refused where they acted."""

import json
from functools import partial

import pytest
from transformers import AutoConfig

from tokcom_hf import DenoisedModelConfig, TokComConfig, TokComVAEConfig
from tokcom_hf.models.shared_removed_fields import take_removed
from tokcom_hf.models.tokcom_removed import OF_0_2

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


OF_TOKCOM = [
    (config, name, former)
    for config in (TokComConfig, TokComVAEConfig, DenoisedModelConfig)
    for name, former in OF_0_2[config.model_type].items()
]


@pytest.mark.parametrize(("config", "name", "former"), OF_TOKCOM)
def test_fields_of_tokcom_that_no_recipe_changed(config, name, former, tmp_path):
    """In a call and in a saved folder."""
    assert not hasattr(config(**{name: former}), name)
    stored = config().to_dict()
    for value, refused in ((former, False), (former + 1, True)):
        (tmp_path / "config.json").write_text(json.dumps(stored | {name: value}))
        for build in (partial(config, **{name: value}), partial(AutoConfig.from_pretrained, tmp_path)):
            if refused:
                with pytest.raises(ValueError, match=rf"{name}={value!r}, which was removed.* is 0\.2\.0"):
                    build()
            else:
                assert not hasattr(build(), name)
