"""Restoration: what is done to a model after its fine-tuning, without training it. One method, one file."""

METHODS = {
    "extract-lock": "tunevax.restoration.extract:ExtractLock",
    "safetylock": "tunevax.restoration.safetylock:ApplyLock",
    "convert-lock": "tunevax.restoration.import_safelock:ConvertLock",
    "safe-lora": "tunevax.restoration.safe_lora:SafeLoRA",
    "antidote": "tunevax.restoration.antidote:Antidote",
}
"""Command-line name to `module:attribute`; other packages add theirs by the entry-point group `tunevax.restoration`."""
