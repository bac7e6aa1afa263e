"""The loss terms of the methods, and the objectives that sum them.

Each loss is a pure function of tensors and is minimized unless it says otherwise. Three functions are not losses:
``slack_margins`` runs a network to measure the margins of ``slack_bn_loss``, ``difficulty`` weights images, and
``trusted_labels`` selects labels.
"""

from dfqlib.losses.images import total_variation_loss
from dfqlib.losses.later import (
    adaptability_loss,
    attention_loss,
    difficulty,
    hard_sample_loss,
    trusted_labels,
)
from dfqlib.losses.objectives import (
    akd_generator_loss,
    akd_prior_loss,
    dafl_loss,
    deep_inversion_loss,
    dfqf_generator_loss,
    gdfq_generator_loss,
    gdfq_student_loss,
)
from dfqlib.losses.outputs import (
    adversarial_loss,
    batch_entropy,
    competition_loss,
    dfad_loss,
    distillation_loss,
    inception_score_loss,
    label_loss,
    one_hot_loss,
    sample_entropy,
)
from dfqlib.losses.slack import SlackMargin, layerwise_enhancement, slack_bn_loss, slack_margins
from dfqlib.losses.statistics import (
    bn_divergence_loss,
    bn_gaussian_kl_loss,
    bn_l2_loss,
    bn_norm_loss,
    zeroq_loss,
)

__all__ = [
    "SlackMargin",
    "adaptability_loss",
    "adversarial_loss",
    "akd_generator_loss",
    "akd_prior_loss",
    "attention_loss",
    "batch_entropy",
    "bn_divergence_loss",
    "bn_gaussian_kl_loss",
    "bn_l2_loss",
    "bn_norm_loss",
    "competition_loss",
    "dafl_loss",
    "deep_inversion_loss",
    "dfad_loss",
    "dfqf_generator_loss",
    "difficulty",
    "distillation_loss",
    "gdfq_generator_loss",
    "gdfq_student_loss",
    "hard_sample_loss",
    "inception_score_loss",
    "label_loss",
    "layerwise_enhancement",
    "one_hot_loss",
    "sample_entropy",
    "slack_bn_loss",
    "slack_margins",
    "total_variation_loss",
    "trusted_labels",
    "zeroq_loss",
]
