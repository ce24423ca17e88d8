"""The training losses of both stages at finite size, L(W)/D^2 and L'(w)/D."""

from __future__ import annotations

from .samples import factor_preactivation, lora_update, square


def pretraining_penalty(W, lam):
    """lam ||W||_F^2 / D^2, the share of the ridge in L(W)/D^2; W of shape (D, P)."""
    return lam * square(W) / W.shape[0] ** 2


def finetuning_penalty(w, lam):
    """lam ||w||_F^2 / D, the share of the ridge in L'(w)/D; w of shape (D, r)."""
    return lam * square(w) / w.shape[0]


def pretraining_loss(W, data):
    """L(W)/D^2 = (sum ||sigma(Z_W) - sigma(Y)||^2 + lam ||W||^2) / D^2; data = (x, sigma(Y), lam, sigma)."""
    inputs, target, lam, activation = data
    fit = square(activation(factor_preactivation(inputs, W)) - target)
    return (fit + lam * square(W)) / W.shape[0] ** 2


def finetuning_loss(w, data):
    """L'(w)/D, L' = sum ||sigma(Z_W + chi chi^T) - sigma(Y')||^2 + lam ||w||_F^2; data as unpacked below."""
    inputs, frozen, target, lam, activation = data
    fit = square(activation(frozen + lora_update(inputs, w)) - target)
    return (fit + lam * square(w)) / w.shape[0]
