"""Data curation: which alignment rows are worth keeping, decided before any alignment method."""

METHODS = {
    "pharmacist": "tunevax.curation.pharmacist:PharmacistConfig",
    "random": "tunevax.curation.baselines:RandomSelector",
    "loss-rank": "tunevax.curation.baselines:LossRankSelector",
    "perplexity": "tunevax.curation.baselines:PerplexitySelector",
    "k-center": "tunevax.curation.k_center:KCenterSelector",
    "gradient-similarity": "tunevax.curation.gradient_similarity:GradientSimilaritySelector",
    "dsir": "tunevax.curation.dsir:DSIRSelector",
}
"""Command-line name to `module:attribute`; other packages add theirs by the entry-point group `tunevax.curation`."""
