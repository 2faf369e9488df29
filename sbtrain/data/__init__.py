"""From raw text to the rows of a training step: tokenizer, prepared corpora, blends, packing, the loader."""
