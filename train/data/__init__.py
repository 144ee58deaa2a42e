"""From text to batches: formats, tokenizer, token files, packing, mixtures, the slices each process reads."""
