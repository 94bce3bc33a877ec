"""Alignment: methods a model publisher runs before release. One method, one file."""

METHODS = {
    "sft": "tunevax.alignment.sft:SFTTrainer",
    "vaccine": "tunevax.alignment.vaccine:VaccineTrainer",
    "t-vaccine": "tunevax.alignment.t_vaccine:TVaccineTrainer",
    "repnoise": "tunevax.alignment.repnoise:RepNoiseTrainer",
    "circuit-breakers": "tunevax.alignment.circuit_breakers:CircuitBreakersTrainer",
    "booster": "tunevax.alignment.booster:BoosterTrainer",
    "tar": "tunevax.alignment.tar:TARTrainer",
}
"""Command-line name to `module:attribute`; other packages add theirs by the entry-point group `tunevax.alignment`."""
