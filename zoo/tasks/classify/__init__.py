"""Classifying images: training and prediction."""
