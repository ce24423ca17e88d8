"""Thresholds, laws of pre-activations, what a second step of breaking changes, `explain` in words."""
