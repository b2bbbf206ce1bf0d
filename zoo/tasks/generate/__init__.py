"""Generation: training, objectives, sampling."""
