"""Lightning modules that train and measure the models."""
