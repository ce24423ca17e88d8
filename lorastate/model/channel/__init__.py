"""What fine-tuning sees of pre-training: the joint law of (label field Y0, frozen pre-activation Z_W)."""
