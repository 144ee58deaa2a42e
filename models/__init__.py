"""Qwen3-MoE in Flax NNX, its attention over the zigzag ring."""
