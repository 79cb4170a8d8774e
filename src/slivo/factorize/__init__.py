"""Factorization: products of thin layers in place of wide ones."""
