"""Finite-size training of the model, and of fine-tuning alone on the channel that the theory assumes."""
