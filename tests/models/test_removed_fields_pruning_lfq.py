"""Configurations of pruning and LFQ read the folders of version 0.2.0, and refuse what would compute something else."""

import pytest

from tokcom_hf import LayerPrunerConfig, LFQConfig, LFQExpandedConfig, PruningDiscriminatorConfig, TokenMergerConfig

FIELDS = [
    (LFQConfig, "layer_norm_eps", 1e-6, 1e-5),
    (LFQConfig, "norm_groups", 1, 2),
    (LFQConfig, "rope_theta", 10000.0, 100.0),
    (LFQConfig, "entropy_temperature", 0.25, 1.0),
    (LFQConfig, "reconstruction_weight", 1.0, 0.0),
    (LFQConfig, "entropy_weight", 0.1, 0.2),
    (LFQExpandedConfig, "bit_order", "least_significant_first", "most_significant_first"),
    (LayerPrunerConfig, "min_tokens", 1, 2),
    (PruningDiscriminatorConfig, "spectral_norm", True, False),
    (TokenMergerConfig, "max_tokens", 576, 8),
]


@pytest.mark.parametrize(("config", "field", "former", "other"), FIELDS)
def test_a_removed_field_is_read_at_its_former_default_only(config, field, former, other):
    assert not hasattr(config(**{field: former}), field)
    with pytest.raises(ValueError, match=f"{field}={other!r}, which was removed; .* reads it is 0.2.0"):
        config(**{field: other})
