"""Attacks on a released model. One kind of attack, one file."""

METHODS = {
    "finetune": "tunevax.attacks.finetune:FinetuneConfig",
    "few-shot": "tunevax.attacks.few_shot:FewShotConfig",
    "benign-only": "tunevax.attacks.benign_only:BenignOnlyConfig",
    "identity-shift": "tunevax.attacks.identity_shift:IdentityShiftConfig",
    "held-out-category": "tunevax.attacks.held_out_category:HeldOutCategoryConfig",
    "adaptive": "tunevax.attacks.adaptive:AdaptiveConfig",
    "template": "tunevax.attacks.template:TemplateConfig",
    "prefill": "tunevax.attacks.prefill:PrefillConfig",
    "roll-back": "tunevax.attacks.roll_back:RollBackConfig",
    "intervention": "tunevax.attacks.intervention:InterventionConfig",
    "poisoned-job": "tunevax.attacks.poisoned_job:PoisonedJobConfig",
    "unlock": "tunevax.attacks.unlock:UnlockConfig",
}
"""Command-line name to `module:class` of an `AttackKind`. Other packages add theirs by the entry-point group
`tunevax.attacks`."""
