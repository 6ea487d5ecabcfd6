"""What another package adds to quant. Each module is named by an entry point in pyproject.toml and imported
when it is asked for."""
