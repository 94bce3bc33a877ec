"""Data curation: which alignment rows are worth keeping, decided before any alignment method."""

METHODS = {
    "pharmacist": "tunevax.curation.pharmacist:PharmacistConfig",
    "random": "tunevax.curation.random_subset:RandomSelector",
    "loss-rank": "tunevax.curation.loss_rank:LossRankSelector",
    "perplexity": "tunevax.curation.perplexity:PerplexitySelector",
    "k-center": "tunevax.curation.k_center:KCenterSelector",
    "gradient-similarity": "tunevax.curation.gradient_similarity:GradientSimilaritySelector",
    "dsir": "tunevax.curation.dsir:DSIRSelector",
}
"""Command-line name to `module:attribute`; other packages add theirs by the entry-point group `tunevax.curation`."""
