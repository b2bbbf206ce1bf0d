"""`zoo app`: checkpoints in a browser, asked by the code of `predict`."""
