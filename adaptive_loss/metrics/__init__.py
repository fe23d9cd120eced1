"""Metrics of generated samples, one file each: pure functions of features ``[N, D]``, or of a loss.

Features come from small classifiers of our own (:mod:`adaptive_loss.metrics.features`), so no number here can be
compared with a published one in Inception features: KID and Fréchet distance rank models that were measured by the
same features, and nothing else.
"""
