"""State evolution: order parameters and the equations of pre-training and of fine-tuning, test errors."""
