"""python -m convert: a Hugging Face checkpoint becomes a verified, quantised GGUF file that rerank_server.py serves.

One module a step, in this order: models, download, checkpoint, tensors, vocab, write, quantize, verify. No torch, no
transformers. Nothing here imports the server; what the server must know of a model is written into the file's metadata
under `rerank.*`, and scores come from `rerank_server.py --check`, run as its own process.
"""
