"""Grids of settings: lanes that share one program, kept as they finish, as a labelled dataset."""
