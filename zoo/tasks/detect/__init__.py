"""Detection: training, matching, losses, prediction."""
