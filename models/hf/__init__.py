"""Hugging Face's models, both ways: `python -m zigzag_jax.models.hf import | export | check`.

names        their parameter names <-> ours, as a table
convert      tensors <-> a state on a mesh, loops over that table
files        safetensors: mapped into memory, written in pieces
saved        the folders a model can lie in: Hugging Face's, an imported one, a training checkpoint
golden       logits and gradients against those that `transformers` computed
__main__     the command line
"""
