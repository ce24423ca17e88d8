"""What a user sets: both stages and the numerics, checked; TOML files and dotted paths."""
