"""Fine-tuning: methods a provider runs while it trains a customer's job. One method, one file."""

METHODS = {
    "sft": "tunevax.finetuning.sft:FinetuneTrainer",
    "surgery": "tunevax.finetuning.surgery:SurgeryTrainer",
    "lisa": "tunevax.finetuning.lisa:LisaTrainer",
    "safe-instruct": "tunevax.finetuning.safe_instruct:SafeInstructTrainer",
    "ldifs": "tunevax.finetuning.ldifs:LDIFSTrainer",
    "ewc": "tunevax.finetuning.ewc:EWCTrainer",
}
"""Command-line name to `module:attribute`; other packages add theirs by the entry-point group `tunevax.finetuning`."""
