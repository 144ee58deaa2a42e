"""Flash attention over per-row key ranges: the contract (contract.py) and its implementations, one a file."""
