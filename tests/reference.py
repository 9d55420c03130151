"""Algorithms 1 and 2 of arXiv 1711.05101v3 in NumPy, float64: slow, obvious, and importing nothing from harness.

The control of every optimizer test. The schedule is restated here too, from the paper and CONTRACT.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np


def eta_cosine_restarts(step: int, steps_per_epoch: int, t_0: float, t_mult: float, eta_min: float) -> tuple[float, int, int]:
    """(eta, cycle, steps in that cycle's full length), cycle by cycle."""
    start, end_epoch, length, cycle = 0, t_0, t_0, 0
    while step >= round(end_epoch * steps_per_epoch):
        start = round(end_epoch * steps_per_epoch)
        length *= t_mult
        end_epoch += length
        cycle += 1
    full = round(end_epoch * steps_per_epoch) - start
    t_cur = (step - start) / full
    return eta_min + 0.5 * (1 - eta_min) * (1 + math.cos(math.pi * t_cur)), cycle, full


@dataclass
class Sgd:
    """Algorithm 1. decay: "none", "l2" or "decoupled"; alpha inside the momentum buffer as printed, or outside."""

    alpha: float
    momentum: float
    decay: str
    inside: bool
    m: dict[str, np.ndarray] = field(default_factory=dict)

    def step(self, theta: dict[str, np.ndarray], grad: dict[str, np.ndarray], eta: float, lam: dict[str, float]) -> None:
        for k in theta:
            g = grad[k] + (lam[k] * theta[k] if self.decay == "l2" else 0.0)
            before = theta[k].copy()
            old = self.m.get(k, np.zeros_like(before))
            if self.inside:
                self.m[k] = self.momentum * old + eta * self.alpha * g
                theta[k] = before - self.m[k]
            else:
                self.m[k] = self.momentum * old + g
                theta[k] = before - eta * self.alpha * self.m[k]
            if self.decay == "decoupled":
                theta[k] = theta[k] - eta * lam[k] * before


@dataclass
class Adam:
    """Algorithm 2."""

    alpha: float
    beta1: float
    beta2: float
    eps: float
    decay: str
    t: int = 0
    m: dict[str, np.ndarray] = field(default_factory=dict)
    v: dict[str, np.ndarray] = field(default_factory=dict)

    def step(self, theta: dict[str, np.ndarray], grad: dict[str, np.ndarray], eta: float, lam: dict[str, float]) -> None:
        self.t += 1
        for k in theta:
            g = grad[k] + (lam[k] * theta[k] if self.decay == "l2" else 0.0)
            before = theta[k].copy()
            zero = np.zeros_like(before)
            self.m[k] = self.beta1 * self.m.get(k, zero) + (1 - self.beta1) * g
            self.v[k] = self.beta2 * self.v.get(k, zero) + (1 - self.beta2) * g * g
            m_hat = self.m[k] / (1 - self.beta1**self.t)
            v_hat = self.v[k] / (1 - self.beta2**self.t)
            theta[k] = before - eta * self.alpha * m_hat / (np.sqrt(v_hat) + self.eps)
            if self.decay == "decoupled":
                theta[k] = theta[k] - eta * lam[k] * before
