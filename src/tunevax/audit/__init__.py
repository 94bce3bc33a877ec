"""The audit: models and a control attacked identically, and what the results say about them."""
