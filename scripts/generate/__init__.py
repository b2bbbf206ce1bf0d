"""Files generated from the code: zoo/facts.json, which the command reads, and configs/README.md."""
