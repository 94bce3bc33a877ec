"""Reads what attacks, scores and audits measured, and says what follows. Imports neither torch nor transformers."""
