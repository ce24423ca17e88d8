"""The model: activations, the inner minimisation over one token matrix, pre-training on a task."""
