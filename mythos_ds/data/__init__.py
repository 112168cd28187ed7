"""Text to batches: corpora, tokenizer, indexed token files, blends and the stream of a data-parallel rank.

megatron-core is used in `megatron.py` only and imported when first needed.
"""
