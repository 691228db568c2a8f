"""Small models, data and runs that several test files share, and scripts that they start."""
