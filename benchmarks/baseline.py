"""What a careful person writes with NumPy and SciPy: `python benchmarks/baseline.py` times one sweep of both stages.

Monte Carlo expectations, `scipy.optimize.minimize` with exact gradients for the inner problem of every sample,
conjugates by the envelope theorem, the spectral integral from the eigenvalues of one sampled S* + delta Z. A solve
needs as many samples as give E' the error asked for, and some 30 damped sweeps of each stage: its time is scaled from
few samples and one sweep (the table says so). Beside it, in the same run, `lorastate.predict` at the same error.
"""

from __future__ import annotations

import time

import numpy as np
from scipy.optimize import minimize

T, ALPHA, DELTA, LAM, KAPPA0 = 3, 0.1, 0.5, 0.02, 1.0
SWEEPS = 30


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def loss(z, target):
    """||softmax(z) - target||^2 and its derivative in the entries of z."""
    p = softmax(z)
    r = p - target
    return np.sum(r * r), 2 * p * (r - np.sum(p * r, 1, keepdims=True))


def goe(rng, count):
    g = rng.standard_normal((count, T, T))
    return (g + np.swapaxes(g, 1, 2)) / np.sqrt(2)


UPPER = np.triu_indices(T)


def pretraining_sweep(rng, count, V, M, Q):
    """(q^, m^, s^) by samples."""
    size = 1 + KAPPA0 + DELTA / 2
    y = np.sqrt(size) * goe(rng, count)
    g = goe(rng, count)
    noise = np.sqrt(Q - M**2 / size)
    omega = M / size * y + noise * g
    slopes = np.zeros(3)
    for k in range(count):
        target = softmax(y[k])

        def f(u, k=k, target=target):
            z = np.zeros((T, T))
            z[UPPER] = u
            z = z + np.triu(z, 1).T
            value, grad = loss(z, target)
            d = z - omega[k]
            grad = grad + d / (2 * V)
            grad = grad + np.tril(grad, -1).T
            return value + np.sum(d * d) / (4 * V), grad[UPPER]

        u = minimize(f, omega[k][UPPER], jac=True, method="BFGS").x
        z = np.zeros((T, T))
        z[UPPER] = u
        z = z + np.triu(z, 1).T
        d = z - omega[k]
        by_noise = -np.sum(d * g[k]) / (2 * V)
        by_norm = by_noise / (2 * noise)
        slopes += [-np.sum(d * d) / (4 * V**2), -np.sum(d * y[k]) / (2 * V * size) - 2 * M / size * by_norm, by_norm]
    by_v, by_m, by_q = slopes / count
    return -4 * ALPHA * by_v, -2 * ALPHA * by_m, 4 * ALPHA * by_q


def spectral_step(rng, qhat, mhat, shat, d=1000):
    """(M, Q) from the eigenvalues of one sampled matrix."""
    w = rng.standard_normal((d, int(KAPPA0 * d)))
    z = rng.standard_normal((d, d))
    base = w @ w.T / np.sqrt(w.shape[1] * d)
    noisy = base + np.sqrt(qhat) / mhat * (z + z.T) / np.sqrt(2 * d)
    values, vectors = np.linalg.eigh(noisy)
    kept = mhat / shat * np.maximum(values - 2 * LAM / mhat, 0)
    overlap = np.mean(kept * np.einsum("ij,ij->j", vectors, base @ vectors))
    return overlap, np.mean(kept**2)


def finetuning_sweep(rng, count, v, m, q):
    """dc/dv, dc/dm, dc/dq of fine-tuning by samples, at M = Q = 1."""
    size = 1 + KAPPA0 + DELTA / 2
    y0, other = np.sqrt(size) * goe(rng, count), goe(rng, count)
    zw = y0 / size + np.sqrt(1 - 1 / size) * other
    star, g = rng.standard_normal((2, count, T))
    omega = m * star + np.sqrt(q - m * m) * g
    total = 0.0
    for k in range(count):
        target = softmax(y0[k] + np.outer(star[k], star[k]))

        def f(chi, k=k, target=target):
            value, grad = loss(zw[k] + np.outer(chi, chi), target)
            d = chi - omega[k]
            return value + d @ d / (2 * v), (grad + grad.T) @ chi + d / v

        found = min((minimize(f, s, jac=True, method="BFGS") for s in (omega[k], star[k])), key=lambda r: r.fun)
        total += found.fun
    return total / count


def main() -> None:
    import jax

    jax.config.update("jax_enable_x64", True)
    import lorastate as ls

    rng = np.random.default_rng(0)
    setting = ls.Setting(ls.Pretraining(ALPHA, LAM), ls.Finetuning(3.0, 0.3))
    ls.predict(setting)
    start = time.perf_counter()
    found = ls.predict(ls.replace(setting, "finetuning.lam", 0.31))
    ours = time.perf_counter() - start
    error = found.stderr("finetuning", "test_error") / float(found.test_error)
    # E' of single samples: its spread says how many of them give that error.
    nodes = 4000
    one = rng.standard_normal((2, nodes, T))
    m, q = float(found.finetuning["m"]), float(found.finetuning["q"])
    star, chi = one[0], m * one[0] + np.sqrt(q - m * m) * one[1]
    size, M, Q = 2.25, float(found.pretraining["M"]), float(found.pretraining["Q"])
    y = np.sqrt(size) * goe(rng, nodes)
    z = M / size * y + np.sqrt(Q - M**2 / size) * goe(rng, nodes)
    outer = star[:, :, None] * star[:, None]
    each = np.sum((softmax(z + chi[:, :, None] * chi[:, None]) - softmax(y + outer)) ** 2, (1, 2))
    needed = int((np.std(each) / np.mean(each) / error) ** 2)
    few = 200
    start = time.perf_counter()
    conjugates = pretraining_sweep(rng, few, float(found.pretraining["V"]), M, Q)
    finetuning_sweep(rng, few, float(found.finetuning["v"]), m, q)
    middle = time.perf_counter()
    M, Q = spectral_step(rng, *conjugates)
    theirs = ((middle - start) * needed / few + time.perf_counter() - middle) * SWEEPS
    print("| | time of a solve | samples |\n|---|---|---|")
    print(f"| NumPy and SciPy, scaled from {few} samples and one sweep to {SWEEPS} | {theirs:.0f} s | {needed} |")
    print(f"| lorastate.predict, with error bars (quadrature error of E' {error:.2%}) | {ours:.2f} s | 16384, 65536 |")
    want = float(found.pretraining["M"]), float(found.pretraining["Q"])
    print(f"\nratio {theirs / ours:.0f}; its sweep gives M, Q = {M:.2f}, {Q:.2f}, ours {want[0]:.3f}, {want[1]:.3f}")


if __name__ == "__main__":
    main()
