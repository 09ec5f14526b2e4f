"""Evaluation metrics: sums over examples, and those that are none.

The first return a pair `(sum, weight)`, which `core.evaluate.evaluator` adds up over batches and divides (`sums`). The
others are computed on the host from all the predictions of a set, as `core.evaluate.collect` gives them: entities in
tags (`tagging`), boxes (`detection`), BLEU (`translation`), word errors (`transcription`), correlations
(`correlation`) and clusters (`clustering`).
"""

from dl_jax.metrics.clustering import adjusted_rand_index, cluster_accuracy, normalised_mutual_information
from dl_jax.metrics.correlation import pearson, spearman
from dl_jax.metrics.detection import Boxes, average_precision
from dl_jax.metrics.sums import (
    accuracy,
    calibration_error,
    confusion_matrix,
    cross_entropy,
    error_rate,
    masked,
    perplexity,
    reliability,
    top_k,
)
from dl_jax.metrics.tagging import Entity, EntityScores, entities, entity_scores
from dl_jax.metrics.transcription import edit_distance, word_error_rate
from dl_jax.metrics.translation import Bleu, bleu

__all__ = [
    "Bleu",
    "Boxes",
    "Entity",
    "EntityScores",
    "accuracy",
    "adjusted_rand_index",
    "average_precision",
    "bleu",
    "calibration_error",
    "cluster_accuracy",
    "confusion_matrix",
    "cross_entropy",
    "edit_distance",
    "entities",
    "entity_scores",
    "error_rate",
    "masked",
    "normalised_mutual_information",
    "pearson",
    "perplexity",
    "reliability",
    "spearman",
    "top_k",
    "word_error_rate",
]
