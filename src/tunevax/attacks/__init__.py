"""Attacks on a released model. One kind of attack, one file."""

METHODS = {
    "finetune": "tunevax.attacks.finetune:FinetuneConfig",
    "poisoned-job": "tunevax.attacks.poisoned_job:PoisonedJobConfig",
    "few-shot": "tunevax.attacks.few_shot:FewShotConfig",
    "benign-only": "tunevax.attacks.benign_only:BenignOnlyConfig",
    "identity-shift": "tunevax.attacks.identity_shift:IdentityShiftConfig",
    "held-out-category": "tunevax.attacks.held_out_category:HeldOutCategoryConfig",
    "adaptive": "tunevax.attacks.adaptive:AdaptiveConfig",
    "roll-back": "tunevax.attacks.roll_back:RollBackConfig",
    "unlock": "tunevax.attacks.unlock:UnlockConfig",
    "intervention": "tunevax.attacks.intervention:InterventionConfig",
    "template": "tunevax.attacks.template:TemplateConfig",
    "prefill": "tunevax.attacks.prefill:PrefillConfig",
}
"""Command-line name to `module:class`: an `AttackKind`, the attacker's options and what they do. Other packages add
theirs by the entry-point group `tunevax.attacks`."""
