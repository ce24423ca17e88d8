"""Gradients of predictions by every input, and descent over any of them under budgets."""
