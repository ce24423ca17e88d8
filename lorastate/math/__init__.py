"""Numerical methods: fixed points with implicit derivatives, quadrature nodes, symmetric matrices. Knows no LoRA."""
