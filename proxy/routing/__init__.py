"""Which backend serves a model."""
