"""Bayes-optimal limits of both stages."""
