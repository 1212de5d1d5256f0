"""Builds wheels for given CUDA versions, and checks them: ``make wheel``, ``make wheels``, ``make check-wheels``."""
