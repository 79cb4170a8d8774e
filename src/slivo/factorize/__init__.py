"""Factorization: products of thin layers in place of wide ones, at the ranks that a budget can afford."""

from slivo.factorize.lowrank import factorize

__all__ = ["factorize"]
