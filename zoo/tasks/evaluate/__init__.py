"""Measures checkpoints on data prepared as their cards say: `zoo evaluate`."""
