"""A checkpoint as one HTML file that runs in a browser: `zoo page`."""
