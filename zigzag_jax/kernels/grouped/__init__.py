"""Grouped matmul, the work of a layer of experts: the contract (contract.py) and its implementations, one a file."""
