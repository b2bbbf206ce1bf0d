"""Lightning modules that train and evaluate the models."""
