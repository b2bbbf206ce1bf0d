"""Recognising speech: training, prediction from files and from a stream."""
