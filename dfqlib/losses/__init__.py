"""Every loss term of the methods, one short pure function each; lower is better unless it says otherwise."""

from dfqlib.losses.outputs import distillation_loss, inception_score_loss
from dfqlib.losses.statistics import (
    bn_divergence_loss,
    bn_gaussian_kl_loss,
    bn_l2_loss,
    bn_norm_loss,
    zeroq_loss,
)

__all__ = [
    "bn_divergence_loss",
    "bn_gaussian_kl_loss",
    "bn_l2_loss",
    "bn_norm_loss",
    "distillation_loss",
    "inception_score_loss",
    "zeroq_loss",
]
